"""The built-in scenes as a task of lmms-eval: an answer counts when it equals the expected one exactly."""
from PIL import Image


def images(doc: dict) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def score(doc: dict, results: list[str]) -> dict:
    """With the scene, so that comparisons know which questions are about the same image."""
    return {"accuracy": {"score": float(results[0] == doc["answer"]), "scene": doc["scene"]}}


def mean(results: list[dict]) -> float:
    return sum(result["score"] for result in results) / len(results)
