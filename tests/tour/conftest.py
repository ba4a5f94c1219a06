"""docs/tour.ipynb is run only where nbclient is installed: `.ci/demo` makes such an environment."""
import importlib.util

if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
    collect_ignore = ["test_tour_runs.py"]
