"""Run docs/tour.ipynb from top to bottom and store its outputs: `python tests/tour/rerun.py`."""
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "tour.ipynb"
LIMIT = 600                 # seconds that no cell takes, not even on a busy machine


def stored() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder, in a new kernel: its outputs are replaced.

    Raises nbclient's CellExecutionError where a cell raises.
    """
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=LIMIT, record_timing=False, resources=resources).execute()
    notebook.metadata.language_info = {"name": "python"}        # without the release of this Python
    return notebook


if __name__ == "__main__":
    nbformat.write(run(stored(), PATH.parent), PATH)
