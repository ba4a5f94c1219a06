"""SEED-Bench without its videos: lmms-eval's own prompt and score, on the questions about one image."""
from datasets import Dataset
from lmms_eval.tasks.seedbench.utils import (
    seed_aggregation_result,
    seed_doc_to_text,
    seed_doc_to_visual,
    seed_process_result,
)

__all__ = ["about_one_image", "score", "seed_aggregation_result", "seed_doc_to_text", "seed_doc_to_visual"]


def about_one_image(dataset: Dataset) -> Dataset:
    return dataset.select([i for i, kind in enumerate(dataset["data_type"]) if kind == "image"])


def score(doc: dict, results: list[str]) -> dict:
    return {"seed_image": seed_process_result(doc, results)["seed_image"]}
