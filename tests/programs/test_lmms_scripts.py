"""The scripts of the paper's tables: the commands that they run, recorded in place of lmms-eval."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.lmms.published import TABLE_1

SCRIPTS = Path(__file__).parents[2] / "evaluation" / "lmms" / "scripts"
RECORDER = """#!{python}
import json, os, sys
with open(os.environ["LOG"], "a") as file:
    file.write(json.dumps([os.environ["LMMS_CACHE_RUN_ID"], sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def rows(tmp_path):
    """What a script runs: of each row the name of its cache, and the options of lmms-eval."""
    recorder = tmp_path / "bin" / "lmms-eval"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER.format(python=sys.executable))
    recorder.chmod(0o755)

    def run(script: str, *arguments: str, **environment: str) -> list[tuple[str, dict[str, str]]]:
        log = tmp_path / "log"
        log.write_text("")
        path = f"{recorder.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([shutil.which("bash"), str(SCRIPTS / script), *arguments], cwd=tmp_path, check=True,
                       env={**os.environ, "PATH": path, "LOG": str(log), **environment})
        made = []
        for line in log.read_text().splitlines():
            name, words = json.loads(line)
            words.remove("--log_samples")
            made.append((name, dict(zip(words[::2], words[1::2], strict=True))))
        return made
    return run


def methods(made: list) -> list[tuple[str, str]]:
    found = []
    for _, options in made:
        parts = dict(part.split("=", 1) for part in options["--model_args"].split(","))
        found.append((parts["prune"], float(parts["keep"])))
    return found


@pytest.mark.parametrize("size", ["11B", "90B"])
def test_table_1_has_every_row_of_the_paper(rows, size):
    made = rows("table1.sh", SIZE=size)
    expected = [("none", 1.0) if keep is None else ("trimmed_llama", keep)
                for name, keep in TABLE_1 if name == size]
    assert methods(made) == expected
    for _, options in made:
        assert f"model=meta-llama/Llama-3.2-{size}-Vision-Instruct," in options["--model_args"]
        assert options["--tasks"] == "seedbench_image,mme,mmvp,llava_in_the_wild"
        assert Path(options["--include_path"]).samefile(SCRIPTS.parent / "tasks")
    assert len({name for name, _ in made}) == len(made)
    assert len({options["--use_cache"] for _, options in made}) == len(made)


def test_table_3_has_random_spatial_and_ours(rows):
    made = rows("table3.sh")
    assert methods(made) == [("random", 0.5), ("spatial", 0.5), ("trimmed_llama", 0.15),
                             ("trimmed_llama", 0.2)]
    assert made[3][1]["--tasks"] == "mmvp"


def test_other_methods_at_other_ratios(rows, tmp_path):
    made = rows("methods.sh", METHODS="coreset,random", KEEPS="0.5 0.1", MODEL="tiny", TASKS="pope",
                BATCH="4")
    assert methods(made) == [("none", 1.0), ("coreset", 0.5), ("coreset", 0.1), ("random", 0.5),
                             ("random", 0.1)]
    options = made[1][1]
    assert (options["--tasks"], options["--batch_size"]) == ("pope", "4")
    assert options["--output_path"] == "runs/tiny/coreset-0.5"
    assert (tmp_path / "runs/tiny/coreset-0.5").is_dir()


def test_options_of_a_row(rows):
    (name, options), = rows("row.sh", "random", "0.5", "full_layers=0", "seed=3", MODEL="/models/mine",
                            OUT="out", ARGS="device=[cuda:0,cuda:1],quantize=int8", LMMS_ARGS="--limit 10")
    assert options["--model_args"] == (
        "model=/models/mine,prune=random,keep=0.5,record=out/mine/random-0.5-full_layers=0-seed=3/kept.jsonl,"
        "set=[full_layers=0,seed=3],device=[cuda:0,cuda:1],quantize=int8")
    assert options["--limit"] == "10" and name == "mine-random-0.5-full_layers-0-seed-3"


def test_a_size_that_is_none_is_refused(tmp_path):
    made = subprocess.run([shutil.which("bash"), str(SCRIPTS / "table1.sh")], cwd=tmp_path, text=True,
                          env={**os.environ, "SIZE": "7B"}, capture_output=True)
    assert made.returncode == 2 and made.stderr == "SIZE is 7B, but must be 11B or 90B\n"
