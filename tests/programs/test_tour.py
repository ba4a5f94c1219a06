"""docs/tour.ipynb as it is stored: short cells, outputs that are the same everywhere, the words of the field.

That the outputs are those of its code is tested in tests/tour, where the notebook is run. After a change
`python tests/tour/rerun.py` runs it and stores the outputs.
"""
import json
import platform
import re
from pathlib import Path

import pytest
from programs.test_docs import found

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "tour.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
CODE = [source for kind, source in CELLS if kind == "code"]
OUTPUTS = [output for cell in NOTEBOOK["cells"] for output in cell.get("outputs", [])]
ABSOLUTE = r"(?<![\w.:/<])/\w[\w.+-]*/|\b[A-Za-z]:\\|file://"


def texts(output: dict) -> list[str]:
    """The text of an output, without its images."""
    data = {name: value for name, value in output.get("data", {}).items() if not name.startswith("image/")}
    return ["".join(value) for value in [output.get("text", []), *data.values()]]


def test_it_is_small_and_its_cells_are_short():
    assert PATH.stat().st_size < 1_500_000
    assert 35 <= len(CELLS) <= 55
    for _, source in CELLS:
        assert len(source.splitlines()) <= 20
        assert max(map(len, source.splitlines())) <= 110, source


def test_it_was_run_once_from_top_to_bottom():
    counts = [cell["execution_count"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert {output["output_type"] for output in OUTPUTS} == {"stream", "display_data", "execute_result"}
    assert {output.get("name", "stdout") for output in OUTPUTS} == {"stdout"}


def test_every_step_asserts_what_it_says():
    assert sum(len(re.findall(r"^ *assert", source, re.M)) for source in CODE) >= 25
    assert not [source for source in CODE if re.search(r"\btime\b|perf_counter", source)]


def test_nothing_tells_where_or_when_it_was_run():
    assert NOTEBOOK["metadata"]["language_info"] == {"name": "python"}
    assert {*NOTEBOOK["metadata"]} == {"kernelspec", "language_info"}
    assert not [cell["id"] for cell in NOTEBOOK["cells"] if cell["metadata"]]
    printed = [text for output in OUTPUTS for text in texts(output)]
    assert len(printed) > 20
    for text in [*printed, *(source for _, source in CELLS)]:
        assert not re.search(ABSOLUTE, text), text
        assert str(ROOT) not in text
    name = platform.node()
    assert not name or not re.search(rf"\b{re.escape(name)}\b", "\n".join(printed))


@pytest.mark.parametrize("path", ["/home/me/x.py", "see /tmp/a/", "'/root/x'", "C:\\me", "file:///x"])
def test_an_absolute_path_is_noticed(path):
    assert re.search(ABSOLUTE, path)
    assert not re.search(ABSOLUTE, "tokens/s, a/b/c ../docs/x [1](../a/b.md) H // G 1 / 1000 <x/y>")


def test_the_images_are_small():
    sizes = [len(value) for output in OUTPUTS for name, value in output.get("data", {}).items()
             if name.startswith("image/")]
    assert len(sizes) >= 6 and max(sizes) < 200_000         # letters of base64


def test_words_and_links_are_those_of_the_other_pages():
    for kind, source in CELLS:
        assert not found(source), source
        if kind == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)", source):
                assert (PATH.parent / target).exists(), target


def test_other_pages_lead_to_it():
    for page in "README.md", "docs/ARCHITECTURE.md":
        assert "tour.ipynb)" in (ROOT / page).read_text(encoding="utf-8")
