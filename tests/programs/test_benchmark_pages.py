"""The pages of the benchmark, its summary in the README, and its drawings."""
from pathlib import Path

import pytest

import benchmark
from benchmarks import tables

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("small_measurements")


def test_the_committed_pages_are_those_of_the_committed_figures():
    files = tables.read_files(benchmark.RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8") == tables.page(files)
    assert tables.with_summary(readme, files) == readme


def test_a_page_without_figures_says_so():
    assert "Nothing has been measured yet." in tables.page({})


def test_the_page_has_every_figure(run_benchmark, tmp_path):
    out, made = run_benchmark("--tiles", "2", "--against", "transformers")
    opened, closed = tables.MARKS
    (tmp_path / "first.md").write_text(f"before {opened} old {closed} after\n", encoding="utf-8")
    tables.write_pages(tmp_path, tmp_path / "page.md", tmp_path / "first.md")
    first = (tmp_path / "first.md").read_text(encoding="utf-8")
    assert first.startswith(f"before {opened}\n\n|") and first.endswith(f"|\n\n{closed} after\n")
    encode = next(row for row in made["rows"] if (row["component"], row["tiles"]) == ("encode", 2))
    name, *cells = tables.summary(tables.read_files(tmp_path))[1]
    assert name == "tiny, 5 decoder layers, bfloat16" and cells[0] == cells[7] == "-"
    assert cells[1] == f"{encode['ratio']:.2f}" and "old" not in first and name in first
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## tiny, 5 decoder layers, bfloat16, cpu" in page and made["command"] in page
    for row in made["rows"]:
        assert "| " + " | ".join(tables.cells(row)) + " |" in page
    for note in tables.notes(made):
        assert f"- {note}" in page and note in out


def test_report_writes_the_page(monkeypatch, tmp_path):
    (folder := tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text("".join(tables.MARKS), encoding="utf-8")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", folder / "results")
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--report"])
    benchmark.main()
    assert (folder / "README.md").read_text(encoding="utf-8") == tables.page({})
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("|") == 20
    with pytest.raises(ValueError, match="no place for the summary"):
        tables.with_summary("nothing", {})


@pytest.mark.parametrize("content", [
    "[]", "{}", "null", '{"rows": [], "ceilings": {}, "waterfall": []}',
    '{"rows": [{"component": "encode"}], "ceilings": {}, "waterfall": [], "methods": [], "equal": []}'])
def test_a_file_that_is_no_measurement_is_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="other.json: not written by"):
        tables.read_files(tmp_path)


@pytest.mark.parametrize("argv", [["--tiles", "1", "--against", "transformers"], ["--waterfall"],
                                  ["--preset", "table2", "--batch", "1"]])
def test_plot(run_benchmark, tmp_path, argv):
    run_benchmark(*argv, "--plot", str(tmp_path / "drawn.png"))
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
