"""What the tests of this folder share: the commands, each run once.

The tests are collected only where lmms-eval is installed; `.ci/run` makes such an environment and runs them.
"""
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rehearsal import PRUNED, QUESTIONS, WHOLE, Workplace, finished, judge, kill_in_the_middle

if importlib.util.find_spec("lmms_eval") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("lmms")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "none", "PATH": path,
                   "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    place = Workplace(folder, environment)
    finished(place.python("-m", "evaluation.lmms.data", str(folder), "--questions", str(QUESTIONS)))
    with judge(environment) as address:
        environment["OPENAI_API_URL"] = address
        yield place


@pytest.fixture(scope="session")
def runs(workplace) -> Workplace:
    """The full model one by one, a pruned one in batches of 8, and evaluate.py. The pruned run is killed in
    the middle, and started again."""
    pruned = workplace.start(*PRUNED, batch=8)
    whole = workplace.start(*WHOLE, batch=1)
    kill_in_the_middle(pruned, workplace.run_folder("trimmed_llama-0.25-full_layers=0") / "kept.jsonl")
    again = workplace.start(*PRUNED, batch=8)
    finished(whole)
    own = workplace.python("evaluate.py", "--questions", str(QUESTIONS), "--prune", "trimmed_llama", "--keep",
                           "0.25", "--set", "full_layers=0", "--json", str(workplace.folder / "own.json"))
    (workplace.folder / "again.log").write_text(finished(again))
    finished(own)
    return workplace
