"""lmms-eval's own task code asks Assistant what it would be asked directly, and its figures are the same."""
import json
import re

import pytest
from datasets import load_dataset
from rehearsal import PRUNED, QUESTIONS, TASKS

import evaluation.compare
from evaluation.lmms import compare, table
from evaluation.lmms.loopback_judge import f1
from evaluation.lmms.record import read_record, shares
from evaluation.lmms.runs import Run, read_run
from generate import Assistant, messages
from pruning import load
from weights.image_file import open_image

FOLDERS = {"whole": "none-1.0", "pruned": "trimmed_llama-0.25-full_layers=0"}
CONTEXT = 2048              # of tiny
DATA = {"scenes": "scenes.parquet",
        "mme": "lmms-lab-encoder/MME/data/test-00000-of-00001.parquet",
        "seedbench_image": "lmms-lab-encoder/SEED-Bench/data/test-00000-of-00001.parquet",
        "mmvp": "lmms-lab-eval/MMVP/data/train-00000-of-00001.parquet",
        "llava_in_the_wild": "lmms-lab-encoder/llava-bench-in-the-wild/data/train-00000-of-00001.parquet"}


@pytest.fixture(scope="module")
def read(runs):
    return lambda name: read_run(runs.run_folder(FOLDERS[name]))


@pytest.fixture(scope="module")
def assistant():
    return Assistant("tiny")


@pytest.fixture(scope="module")
def documents(runs):
    made = {task: load_dataset("parquet", data_files=str(runs.folder / path), split="train",
                               cache_dir=str(runs.folder / "cache")) for task, path in DATA.items()}
    kinds = made["seedbench_image"]["data_type"]
    made["seedbench_image"] = made["seedbench_image"].select(
        [i for i, kind in enumerate(kinds) if kind == "image"])
    return made


def text_of(sample: dict) -> str:
    """As it was answered; `filtered_resps` has no white space at its ends, `resps` is there if it has."""
    text = sample.get("resps", sample["filtered_resps"])
    while isinstance(text, list):
        text, = text
    return text


def right(run: Run) -> list[bool]:
    return [sample["accuracy"]["score"] == 1 for sample in run.samples("scenes")]


# ----- the same answers


@pytest.mark.parametrize(("name", "row"), [("whole", 0), ("pruned", 1)])
def test_scenes_are_answered_as_by_evaluate(read, runs, name, row):
    own = json.loads((runs.folder / "own.json").read_text())["rows"][row]
    expected = [mark == "1" for mark in own["right"] if mark != " "]
    assert len(expected) == QUESTIONS and True in expected and (row == 0 or False in expected)
    run = read(name)
    assert right(run) == expected
    kept = shares(run.kept, "scenes")
    assert len(kept) == QUESTIONS and abs(sum(kept) / QUESTIONS - own["kept"]) < 1e-6


@pytest.mark.parametrize("name", ["whole", "pruned"])
@pytest.mark.parametrize("task", TASKS.split(","))
def test_every_text_is_what_assistant_answers(read, documents, assistant, name, task):
    """One question at a time, where the pruned run had batches of 8 different images."""
    run = read(name)
    samples = run.samples(task)
    assert len(samples) == len(documents[task]) >= 4
    pruner = load("trimmed_llama", keep=0.25, full_layers=0) if name == "pruned" else None
    most = tokens_asked(run, task)
    for sample, document in zip(samples, documents[task], strict=True):
        images = document["image"] if isinstance(document["image"], list) else [document["image"]]
        encoded = assistant.encode_images([open_image(image) for image in images])
        question = messages(sample["input"], len(images))
        room = CONTEXT - len(assistant.tokenizer.encode(question))
        answer = assistant.answer([question], encoded, min(most, room), pruner=pruner)
        assert text_of(sample) == answer.texts[0]
        line = run.kept[task, str(sample["doc_id"])]
        assert (line["real"], line["kept"]) == (encoded.real, answer.kept[0])


def tokens_asked(run: Run, task: str) -> int:
    result, = run.path.rglob("*_results.json")
    return json.loads(result.read_text())["configs"][task]["generation_kwargs"].get("max_new_tokens", 1024)


def test_the_questions_are_those_of_the_task_code(read, documents):
    run = read("whole")
    assert all(sample["input"].endswith("\nAnswer the question using a single word or phrase.")
               for sample in run.samples("mme"))
    assert all("\nA. yes\nB. no" in sample["input"] for sample in run.samples("mmvp"))
    assert len(run.samples("seedbench_image")) < QUESTIONS // 2             # without its videos
    assert tokens_asked(run, "llava_in_the_wild") == 4096                   # more than the context holds


def test_the_judge_was_asked(read):
    run = read("whole")
    reviews = [sample["gpt_eval_llava_all"] for sample in run.samples("llava_in_the_wild")]
    expected = [round(10 * f1(review["ans1"], review["ans2"]), 1) for review in reviews]
    assert [review["scores"] for review in reviews] == [[10, score] for score in expected]
    mean = sum(expected) / len(expected)
    assert run.scores["llava_in_the_wild"]["gpt_eval_llava_all"] == pytest.approx(10 * mean, abs=0.06)


# ----- a run that was killed


def test_a_killed_run_went_on_where_it_was(runs):
    log = (runs.folder / "again.log").read_text()
    hits, asked = map(int, re.search(r"(\d+)/(\d+) cache hits", log).groups())
    assert 8 <= hits < asked
    settings, lines = read_record(runs.run_folder(FOLDERS["pruned"]) / "kept.jsonl")
    assert settings["prune"] == ["trimmed_llama", 0.25, {"full_layers": 0}]
    raw = (runs.run_folder(FOLDERS["pruned"]) / "kept.jsonl").read_text().splitlines()
    assert len(raw) == 1 + len(lines) == 1 + asked                          # each question once


# ----- tables and comparisons


def test_the_table_has_published_numbers_beside_ours(read):
    page = table.page([read("whole"), read("pruned")])
    ours = 100 * read("pruned").scores["seedbench_image"]["seed_image"]
    row = next(line for line in page.splitlines() if line.startswith("tiny, trimmed_llama 0.25"))
    assert f" {ours:.1f} (" in row
    for published in "72.3 (61.5)", "1687.3 (65.1)", "47.3 (61.9)", "88.1 (72.7)", "72.6", "1685.9":
        assert published in page
    for note in "does not name its judge", "two of 150 pairs are corrected", "first cross-attention layer":
        assert note in page
    assert "of these alone" not in page


def test_two_runs_are_compared_as_by_evaluate(read, runs):
    page = compare.comparison(read("pruned"), read("whole"), TASKS.split(","))
    line = next(line for line in page.splitlines() if line.startswith("scenes, accuracy"))
    shown = [100 * float(number) for number in re.findall(r"[+-]\d\.\d+", line)]
    own = evaluation.compare.comparison(evaluation.compare.read_rows([runs.folder / "own.json"]), PRUNED[0])
    theirs = [float(number) for number in re.findall(r"[+-]\d+\.\d+", own.splitlines()[2])]
    assert len(theirs) == 3 and shown == pytest.approx(theirs, abs=0.06)
    for metric in "mmvp, mmvp_pair_accuracy", "mme, mme_perception_score", "seedbench_image, seed_image":
        assert metric in page


def test_other_tasks_are_refused(read):
    with pytest.raises(ValueError, match="has no samples of pope"):
        compare.comparison(read("pruned"), read("whole"), ["pope"])
