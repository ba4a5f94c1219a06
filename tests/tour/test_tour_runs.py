"""docs/tour.ipynb runs from top to bottom in a new kernel, and says again what is stored in it."""
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from rerun import PATH, ROOT, run, stored

MOST = 120                  # seconds of one processor for the notebook, with its imports
PROCESSOR_TIME = "import time\n\nprint(time.process_time())"


def outputs(notebook: nbformat.NotebookNode) -> list[list[tuple]]:
    """Of each cell what it printed, and what kinds of images it showed."""
    cells = []
    for cell in notebook.cells:
        printed = "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")
        data = [output.data for output in cell.get("outputs", []) if "data" in output]
        cells.append([printed, *(({*shown}, shown.get("text/plain")) for shown in data)])
    return cells


@pytest.fixture(scope="module")
def again() -> nbformat.NotebookNode:
    notebook = stored()
    notebook.cells = [*notebook.cells, nbformat.v4.new_code_cell(PROCESSOR_TIME)]
    return run(notebook, PATH.parent)


def test_the_stored_outputs_are_those_of_its_code(again):
    expected = outputs(stored())
    assert sum(bool(printed) for printed, *_ in expected) > 15
    assert sum(len(shown) for _, *shown in expected) >= 6
    assert outputs(again)[:-1] == expected


def test_it_takes_less_than_two_minutes_of_a_processor(again):
    (seconds,), = outputs(again)[-1:]
    assert 1 < float(seconds) < MOST


def test_it_begins_in_the_root_as_well():
    notebook = stored()
    first = next(i for i, cell in enumerate(notebook.cells) if "examples" in cell.source and "open_image(" in
                 cell.source)
    notebook.cells = notebook.cells[:first + 1]
    assert outputs(run(notebook, ROOT)) == outputs(stored())[:first + 1]


def test_a_cell_that_is_not_true_is_noticed():
    notebook = stored()
    notebook.cells = [*notebook.cells[:2], nbformat.v4.new_code_cell("assert torch.is_grad_enabled()")]
    with pytest.raises(CellExecutionError):
        run(notebook, PATH.parent)
