"""A sweep that was stopped goes on where it was; damaged results and a full disk are one line."""
import json
import os
from collections.abc import Callable

import pytest
from full_disk import full_disk
from sweeps import SWEEP, evaluate_command, timeless

import evaluate
import generate
from evaluation.exam import make_exam
from evaluation.store import Store


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.fixture
def run(monkeypatch, capsys):
    return evaluate_command(monkeypatch, capsys)


def test_a_stopped_sweep_goes_on_where_it_was(sweep, run, monkeypatch, tmp_path):
    out, part, original, asked = tmp_path / "out.json", tmp_path / "out.json.part", evaluate.examine, []

    def interrupted(assistant, scene, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(scene)
        return original(assistant, scene, *rest)

    monkeypatch.setattr(evaluate, "examine", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*SWEEP, "--json", out)
    assert stop.value.code == 130 and not out.exists()
    assert part.read_bytes().count(b'{"number": ') == 2
    with open(part, "ab") as file:
        file.write(b'{"rows": [{"right": [tr')                               # killed while it wrote

    def counted(assistant, scene, *rest):
        asked.append(scene)
        return original(assistant, scene, *rest)

    monkeypatch.setattr(evaluate, "examine", counted)
    run(*SWEEP, "--json", out)
    assert asked == [scene for scene, _ in make_exam(12)]
    expected = json.loads((sweep / "out.json").read_text())
    assert timeless(json.loads(out.read_text())) == timeless(expected)
    assert list(tmp_path.iterdir()) == [out]


def test_partial_results_of_another_run_are_refused(run, capsys, monkeypatch, tmp_path):
    part = tmp_path / "out.json.part"
    with Store(tmp_path / "out.json", {"other": 1}) as store:
        store.add({"rows": []})
    before = part.read_bytes()
    monkeypatch.setattr(evaluate, "Assistant", None)
    with pytest.raises(SystemExit) as stop:
        run(*SWEEP, "--json", tmp_path / "out.json")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "delete this file" in error
    assert part.read_bytes() == before


def test_store(sweep, tmp_path):
    path, part = tmp_path / "x.json", tmp_path / "x.json.part"
    figures = json.loads((sweep / "out.json").read_text())
    settings = {"keep": 1.0, **figures["settings"]}
    store = Store(path, settings)
    with store:
        assert store.records == [] and part.exists()
    assert store.finished() is None and not part.exists()                   # nothing was done
    part.write_bytes(b'{"sp')                                               # not even the header is complete
    with store:
        assert store.records == []
        for record in {"a": 1}, {"a": 2}:
            store.add(record)
    for _ in range(2):
        with store:
            assert store.records == [{"a": 1}, {"a": 2}]
    for other in {**settings, "keep": 1}, {**settings, "keep": 0.5}:        # 1 is one token, 1.0 all of them
        with pytest.raises(ValueError, match="other settings"), Store(path, other):
            pass
    path.write_text("[]")
    assert store.finished() is None
    with store:
        store.finish({**figures, "settings": settings})
    assert list(tmp_path.iterdir()) == [path] and store.finished()["rows"] == figures["rows"]
    assert Store(path, {**settings, "keep": 1}).finished() is None
    with store:
        store.add({"a": 3})
    assert store.finished() is None                                         # begun anew
    part.write_bytes(part.read_bytes() + b"nonsense\n")
    with pytest.raises(ValueError, match="damaged"), store:
        pass


@pytest.fixture(scope="module")
def complete(tmp_path_factory, assistant) -> bytes:
    """FILE.part of the sweep when all images are done."""
    out = tmp_path_factory.mktemp("part") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *SWEEP, "--json", str(out)])
        patch.setattr(evaluate, "Assistant", lambda *_, **__: assistant)
        patch.setattr(evaluate, "figures", lambda *_: next(iter(())))
        with pytest.raises(StopIteration):
            evaluate.main()
    return out.with_name("out.json.part").read_bytes()


def refused(run, capsys, *argv) -> str:
    """The one line that the command says."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_second_run_on_the_same_file_is_refused(run, capsys, monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr(evaluate, "Assistant", None)
    with Store(out, {}) as store:
        store.add({"rows": []})
        before = store.part.read_bytes()
        error = refused(run, capsys, *SWEEP, "--json", out)
        assert f"process {os.getpid()} on " in error and "is writing it; wait" in error
        assert store.part.read_bytes() == before
    with Store(out, {}) as store:                                           # and now it is free
        assert store.records == [{"rows": []}]


def test_two_runs_without_locks_do_not_mix_their_records(monkeypatch, tmp_path):
    """As on Windows: the numbers show it."""
    monkeypatch.setattr("weights.locked_file.fcntl", None)
    first, second = Store(tmp_path / "x.json", {}), Store(tmp_path / "x.json", {})
    with first, second:
        for store in first, second:
            store.add({"a": 0})
    with pytest.raises(ValueError, match="damaged .record 1 is not where it should be.; delete"), first:
        pass


def edited(record: int, change: Callable[[dict], object]) -> Callable[[list[bytes]], list[bytes]]:
    """Lines of FILE.part in which one record was changed."""
    def edit(lines: list[bytes]) -> list[bytes]:
        content = json.loads(lines[2 + record])
        change(content)
        return [*lines[:2 + record], json.dumps(content).encode(), *lines[3 + record:]]
    return edit


def first_row(**values: object) -> Callable[[list[bytes]], list[bytes]]:
    return edited(1, lambda record: record["rows"][0].update(values))


DEEP = b"[" * 100000
DAMAGES = {
    **{f"a line {line[:9]!r}": (lambda lines, line=line: [*lines, line])
       for line in (b"5", b"null", b"NaN", b"[]", b"{}", b"", b'"x"', b"\xff\xfe", DEEP, b"1" * 5000, b"{{")},
    "a line cut off": lambda lines: [*lines[:3], lines[3][:50], *lines[4:]],
    "a record twice": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "a record left out": lambda lines: [*lines[:3], *lines[4:]],
    "records of another run": lambda lines: [*lines[:2], *lines[4:]],
    "too many records": lambda lines: [*lines, json.dumps({**json.loads(lines[-1]), "number": 4}).encode()],
    "no rows": edited(0, lambda record: record.pop("rows")),
    "rows of another shape": edited(0, lambda record: record.update(rows={})),
    "a row too few": edited(0, lambda record: record["rows"].pop()),
    "a row that is none": edited(0, lambda record: record["rows"].insert(0, record["rows"].pop() and 5)),
    "an answer too many": edited(2, lambda record: record["rows"][1]["right"].append(True)),
    "answers that are numbers": first_row(right=[1, 0, 1]),
    "answers that are words": first_row(wrong_yes=["no", "no", "no"]),
    "answers that are none": first_row(early=None),
    "kept that is no number": first_row(kept=[float("nan")] * 3),
    "kept that is too large": first_row(kept=[10 ** 400] * 3),
    "kept below 0": first_row(kept=[-1.0] * 3),
    "bytes that are a word": first_row(image_kv_bytes="many"),
    "a time that is none": first_row(prefill_ms=None),
    "a time that is infinite": first_row(decode_ms=float("inf")),
    "steps below 0": first_row(steps=-1),
    "no similarity": edited(0, lambda record: record.update(layer_similarity=None)),
    "similarity of two layers": edited(0, lambda record: record.update(
        layer_similarity={"cosine": [[1, 1], [1, 1]], "top10_overlap": [[1, 1], [1, 1]]})),
    "similarity of another shape": edited(0, lambda record: record.update(
        layer_similarity={"cosine": [[1, 1, 1], [1], [1]], "top10_overlap": [5, 5, 5]})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_one_line(run, capsys, monkeypatch, assistant, complete, tmp_path, damage):
    part = tmp_path / "out.json.part"
    damaged = b"\n".join([*DAMAGES[damage](complete.split(b"\n")[:-1]), b""])
    part.write_bytes(damaged)
    monkeypatch.setattr(evaluate, "Assistant", lambda *_, **__: assistant)
    error = refused(run, capsys, *SWEEP, "--json", tmp_path / "out.json")
    assert "out.json.part: damaged (" in error and "delete this file" in error and len(error) < 600
    assert part.read_bytes().startswith(damaged) and list(tmp_path.iterdir()) == [part]


def test_a_part_with_all_records_asks_nothing(sweep, run, monkeypatch, assistant, complete, tmp_path):
    (tmp_path / "out.json.part").write_bytes(complete)
    monkeypatch.setattr(evaluate, "Assistant", lambda *_, **__: assistant)
    monkeypatch.setattr(evaluate, "examine", None)
    run(*SWEEP, "--json", tmp_path / "out.json")
    expected = json.loads((sweep / "out.json").read_text())
    assert timeless(json.loads((tmp_path / "out.json").read_text())) == timeless(expected)


@pytest.mark.parametrize("content", ["5", "{}", "null", "NaN", "[]", "", "{", "[" * 100000, "1" * 5000,
                                     '{"settings": 5}', "caf\udce9"], ids=len)
def test_what_holds_no_figures_is_replaced(sweep, tmp_path, content):
    out = tmp_path / "out.json"
    out.write_bytes(content.encode(errors="surrogateescape"))
    settings = json.loads((sweep / "out.json").read_text())["settings"]
    assert Store(out, settings).finished() is None
    with Store(out, settings) as store:
        store.finish({"settings": settings})
    assert json.loads(out.read_text()) == {"settings": settings}


@pytest.mark.parametrize("damage", [
    {"rows": 5}, {"rows": []}, {"rows": [5]}, {"rows": [{}]}, {"rows": None}, {"questions": None},
    {"model": 5}, {"layer_similarity": 5}, {"layer_similarity": {"cosine": [[1, 2]], "top10_overlap": [[1]]}},
    {"row": {"kept": float("nan")}}, {"row": {"accuracy": None}}, {"row": {"accuracy_by_kind": {}}},
    {"row": {"options": []}}, {"row": {"low": "x"}}, {"row": {"method": None}},
    {"row": {"prefill_ms": 10 ** 400}}, {"row": {"wrong_yes": "all"}}], ids=str)
def test_damaged_figures_are_one_line(sweep, run, capsys, tmp_path, damage):
    figures = json.loads((sweep / "out.json").read_text())
    figures["rows"][1].update(damage.pop("row", {}))
    (tmp_path / "out.json").write_text(json.dumps({**figures, **damage}))
    error = refused(run, capsys, *SWEEP, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert "out.json: the figures are damaged; delete this file to ask again" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_a_full_disk_leaves_what_was_there(sweep, run, capsys, monkeypatch, assistant, complete, tmp_path):
    """While the answers are written, and the drawing; the same command goes on afterwards."""
    out, drawing = tmp_path / "out.json", tmp_path / "out.png"
    out.write_text("the old figures")
    drawing.write_text("the old drawing")
    monkeypatch.setattr(evaluate, "Assistant", lambda *_, **__: assistant)
    command = *SWEEP, "--json", out, "--plot", drawing
    with full_disk(3000):
        error = refused(run, capsys, *command)
    assert "out.json.part: cannot be written" in error and "the same command goes on from here" in error
    assert out.read_text() == "the old figures" and drawing.read_text() == "the old drawing"
    run(*command)
    expected = json.loads((sweep / "out.json").read_text())
    assert timeless(json.loads(out.read_text())) == timeless(expected)
    drawing.write_text("the old drawing")
    with full_disk(1000), pytest.raises(SystemExit):
        run(*command)
    assert "out.png: cannot be written" in capsys.readouterr().err
    assert drawing.read_text() == "the old drawing" and sorted(tmp_path.iterdir()) == [out, drawing]


def test_a_full_disk_at_the_end_leaves_the_answers(tmp_path):
    store = Store(tmp_path / "x.json", {})
    store.path.write_text("the old figures")
    with pytest.raises(OSError), store:
        store.add({"a": 1})
        with full_disk(1000):
            store.finish({"rows": [0] * 1000})
    assert store.path.read_text() == "the old figures" and set(tmp_path.iterdir()) == {store.path, store.part}
    with store:
        assert store.records == [{"a": 1}]
