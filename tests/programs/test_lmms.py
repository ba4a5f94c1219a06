"""The lmms-eval adapter without lmms-eval: mixed batches, the record, tables, comparisons, costs, a judge.

What needs lmms-eval itself is tested in tests/lmms.
"""
import ast
import json
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest
from generate_helpers import drawn
from helpers import refused

from evaluation.lmms import compare, cost, loopback_judge, published, table
from evaluation.lmms.questions import Limits, Question, answer
from evaluation.lmms.record import Record, read_record
from evaluation.lmms.runs import read_run
from generate import Assistant, messages
from pruning import METHODS, load

ROOT = Path(__file__).parents[2]
SETTINGS = {"model": "tiny", "prune": ["trimmed_llama", 0.25, {}]}
FEW = Limits(6)


@pytest.fixture(scope="module")
def assistant():
    return Assistant("tiny")


@pytest.fixture(scope="module")
def mixed():
    """Images of one tile, of two, two images, and none; and three different limits."""
    wide, small = drawn(224, 112), drawn(112, 112)
    return [Question("Where is the circle?", [wide], FEW), Question("How are you?", [], FEW),
            Question("What colour is the square?", [small, wide], Limits(3)),
            Question("Which shape is red?", [small], Limits(6, stop=("e",)))]


# ----- batches


@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_equals_its_questions_alone(assistant, mixed, method):
    pruner = load(method, keep=0.5)
    together = answer(assistant, [*mixed, mixed[0]], pruner)
    assert together[4].text == together[0].text
    for question, made in zip(mixed, together, strict=False):
        alone, = answer(assistant, [question], load(method, keep=0.5))
        assert (made.text, made.kept, made.real) == (alone.text, alone.kept, alone.real)
    assert together[1].kept == [] and together[1].real == 0 < together[0].real < together[2].real


def test_a_question_alone_is_what_assistant_answers(assistant, mixed):
    for question in mixed[:3]:
        made, = answer(assistant, [question], load("trimmed_llama", keep=0.25))
        encoded = assistant.encode_images(list(question.images))
        said = assistant.answer([messages(question.text, len(question.images))], encoded,
                                question.limits.max_new_tokens, pruner=load("trimmed_llama", keep=0.25))
        assert (made.text, made.kept, made.real) == (said.texts[0], said.kept[0], encoded.real)


def test_an_answer_ends_where_the_context_does(assistant, mixed):
    long, = answer(assistant, [Question("?", [], Limits(10 ** 6))])
    assert long.new_tokens <= 2048 - long.prompt_tokens
    with refused("fills the context of 2048"):
        answer(assistant, [Question("? " * 3000, [], FEW)])


def test_stop_texts_end_only_their_own_question(assistant, mixed):
    free, = answer(assistant, [Question(mixed[3].text, mixed[3].images, FEW)])
    stopped = answer(assistant, [mixed[0], mixed[3]])[1]
    assert "e" in free.text and stopped.text == free.text.split("e")[0]


def test_prompts_do_not_depend_on_the_day(assistant, mixed, monkeypatch):
    """Chat templates write today's date, the official one beside text alone."""
    dates = []
    encode = assistant.tokenizer.encode
    monkeypatch.setattr(assistant.tokenizer, "encode",
                        lambda turns, date=None, *rest: dates.append(date) or encode(turns, date))
    answer(assistant, mixed[:2])
    assert {*dates} == {"26 Jul 2024"}


def test_images_of_a_batch_without_any(assistant):
    encoded = assistant.encode_images([[], []])
    assert encoded.tokens is None and encoded.real_of_each == [0, 0] and encoded.slots == 0


# ----- the record


def line(doc_id, task="mme", kept=10.0, real=50):
    return {"task": task, "doc_id": doc_id, "real": real, "kept": [real * 1.0, kept] if real else []}


def test_a_record_goes_on_where_a_killed_run_ended(tmp_path):
    path = tmp_path / "new" / "kept.jsonl"
    Record(path, SETTINGS).add([line(0), line(1)])
    with open(path, "a") as file:
        file.write('{"task": "mme", "doc_')                # cut off
    again = Record(path, SETTINGS)
    again.add([line(1), line(2), line(2), line(0, task="mmvp")])
    settings, lines = read_record(path)
    assert settings == SETTINGS and len(path.read_text().splitlines()) == 5
    assert list(lines) == [("mme", "0"), ("mme", "1"), ("mme", "2"), ("mmvp", "0")]


def test_records_of_others_are_refused(tmp_path):
    path = tmp_path / "kept.jsonl"
    Record(path, SETTINGS)
    with refused("other settings"):
        Record(path, {**SETTINGS, "model": "other"})
    head = json.dumps(SETTINGS)
    for text, words in ("[1]\n", "no record"), ("{\n", "no record"), (head + "\n{}\n", "without a task"):
        path.write_text(text)
        with refused(words):
            Record(path, SETTINGS)
        with refused(words):
            read_record(path)
    path.write_text("")
    with refused("no record"):
        read_record(path)


# ----- tables and comparisons


def run_folder(folder: Path, prune: list, right: list[int]) -> Path:
    """A run of SEED-Bench and MME, as lmms-eval 0.7.3 writes it."""
    record = Record(folder / "kept.jsonl", {"model": "Llama-3.2-11B-Vision-Instruct", "prune": prune})
    record.add([line(i, "seedbench_image") for i in range(len(right))] + [line(0), line(1)])
    (folder / "m").mkdir()
    results = {"seedbench_image": {"alias": "seedbench_image", "seed_image,none": sum(right) / len(right)},
               "mme": {"mme_perception_score,none": 1000.0, "mme_cognition_score,none": 200.5}}
    counts = {"seedbench_image": {"original": 9, "effective": len(right)},
              "mme": {"original": 2, "effective": 2}}
    (folder / "m" / "1_results.json").write_text(json.dumps({"results": results, "n-samples": counts}))
    samples = [{"doc_id": i, "input": "?", "target": "A", "seed_image": {
        "pred": "A" if good else "B", "answer": "A", "question_id": str(i)}} for i, good in enumerate(right)]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "m" / "1_samples_seedbench_image.jsonl").write_text(text)
    return folder


@pytest.fixture
def folders(tmp_path):
    return [run_folder(tmp_path / "a", ["none", 1.0, {}], [1, 1, 1, 1]),
            run_folder(tmp_path / "b", ["trimmed_llama", 0.25, {"early_caches": "full"}], [1, 0, 1, 0])]


def test_a_table_has_the_papers_rows(folders):
    page = table.page([read_run(folder) for folder in folders])
    lines = page.splitlines()
    assert "100.0 (60.0)" in lines[1] and "1200.5 (60.0)" in lines[1]
    assert "50.0 (60.0)" in lines[4] and "1200.5 (60.0)" in lines[4]
    assert "72.3 (61.5)" in lines[5] and "-22.3 (-1.5)" in lines[6] and "-486.8 (-5.1)" in lines[6]
    assert "asked 4 of 9 questions" in page and "without the first layer 20.0 % of seedbench_image" in page


def test_published_rows_are_those_of_the_paper():
    """MME is the sum of its parts in every row of Table 1; the paper rounds."""
    for cells in published.TABLE_1.values():
        assert cells["MME"][0] == pytest.approx(cells["MME-cog"][0] + cells["MME-per"][0], abs=0.11)
        assert {cells[name][1] for name in ("MME", "MME-cog", "MME-per")} == {cells["MME"][1]}
    assert len(published.TABLE_1) == 9 and published.TABLE_1["90B", 0.15]["LLaVA-Bench"] == (92.2, 52.4)


def test_a_comparison_has_the_paired_interval(folders):
    page = compare.comparison(*[read_run(folder) for folder in folders], ["seedbench_image"])
    row = next(line for line in page.splitlines() if "seed_image" in line)
    assert row.split()[2:7] == ["4", "1.000", "0.500", "+0.500", "[+0.000,"]
    assert compare.comparison(*[read_run(folders[0])] * 2, ["seedbench_image"]).count("+0.000") == 3


def test_what_is_no_run_is_refused(folders, tmp_path):
    with refused("is no folder"):
        read_run(tmp_path / "c")
    first, second = map(read_run, folders)
    with refused("has no samples of mme"):
        compare.comparison(first, second, ["mme"])
    samples = folders[1] / "m" / "1_samples_seedbench_image.jsonl"
    samples.write_text(samples.read_text().replace('"?"', '"!"'))
    with refused("asked other questions"):
        compare.comparison(first, second, ["seedbench_image"])
    samples.write_text("[]\n")
    with refused("no samples of lmms-eval"):
        compare.comparison(first, second, ["seedbench_image"])
    (folders[1] / "m" / "1_results.json").write_text('{"results": {"mme": 1}}')
    with refused("no result of lmms-eval"):
        read_run(folders[1])
    (folders[1] / "m" / "1_results.json").unlink()
    with refused("has no results"):
        read_run(folders[1])


def test_only_means_of_questions_are_compared(folders):
    """F1 of POPE: its samples have the score of accuracy. CIDEr's have none."""
    runs = []
    for folder, good in zip(folders, (1.0, 0.5), strict=True):
        scores = [{"score": float(i < 4 * good), "question_id": i} for i in range(4)]
        samples = [{"doc_id": i, "input": "?", "target": "yes", "accuracy": score, "f1": score,
                    "CIDEr": {"answer": ["a"], "pred": "b"}} for i, score in enumerate(scores)]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / "m" / "1_samples_pope.jsonl").write_text(text)
        runs.append(read_run(folder))
        runs[-1].scores["pope"] = {"accuracy": good, "f1": 0.9 * good, "CIDEr": 1.0}
    page = compare.comparison(*runs, ["pope"])
    assert "pope, accuracy" in page and "+0.500" in page
    assert "pope, f1; pope, CIDEr" in page.splitlines()[-1]


@pytest.mark.parametrize(("value", "score"), [
    (1, 1.0), (0.5, 0.5), ({"score": 1.0, "category": "x"}, 1.0), ({"is_correct": False}, 0.0),
    ({"scores": [10, 7.5]}, 7.5), ({"pred": "a", "answer": "A", "question_id": 1}, 1.0),
    ({"answer": ["a"], "pred": "b"}, None), ("text", None)])
def test_scores_of_single_questions(value, score):
    assert compare.score_of(value) == score


# ----- costs, the judge, names


def test_costs_are_of_every_row(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cost", "--table", "1"])
    cost.main()
    head, eleven, ninety, note = capsys.readouterr().out.splitlines()
    hours = [list(map(float, line.split()[2:])) for line in (eleven, ninety)]
    for row, rows in zip(hours, (6, 3), strict=True):
        assert sum(row[:4]) == pytest.approx(row[4], abs=0.03)
        assert row[5] == pytest.approx(rows * row[4], rel=0.02)
    assert hours[1][4] > 5 * hours[0][4] and "not measured" in note


def test_rows_of_every_method_are_those_of_the_script():
    script = (ROOT / "evaluation" / "lmms" / "scripts" / "methods.sh").read_text()
    named = script.split("METHODS:-")[1].split("}")[0].split(",")
    assert {*named, *cost.LEARNED, "none"} == {*METHODS} and len(named) == len(METHODS) - 4
    keeps = script.split("KEEPS:-")[1].split("}")[0].split()
    assert 1 + len(named) * len(keeps) == cost.METHOD_ROWS


def test_the_judge_counts_shared_words():
    server = loopback_judge.ThreadingHTTPServer(("127.0.0.1", 0), loopback_judge.Judge)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    content = ("[Context]\n\n\n[Assistant 1]\na red ring\n\n[End of Assistant 1]\n\n[Assistant 2]\nred\n\n"
               "[End of Assistant 2]\n\n[System]\n")
    asked = json.dumps({"model": "x", "messages": [{"role": "user", "content": content}]}).encode()
    with urllib.request.urlopen(urllib.request.Request(address, asked)) as reply:
        said = json.load(reply)["choices"][0]["message"]["content"]
    assert said.splitlines()[0] == "10 5.0"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, b"{}"))
    server.shutdown()
    server.server_close()


def test_nothing_of_the_adapter_imports_the_program_evaluate():
    """lmms-eval installs a library of that name."""
    for path in [*(ROOT / "evaluation").rglob("*.py"), *(ROOT / "cli").glob("*.py"), ROOT / "generate.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            assert "evaluate" not in names, path
