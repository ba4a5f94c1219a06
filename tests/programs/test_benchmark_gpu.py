"""benchmarks/gpu.sh: it has been rehearsed, so that nobody finds a fault on an expensive card.

Here it runs whole, on the CPU with the smallest shape: every option, every file that it writes.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict[str, dict]:
    """What the script wrote, by the name of the file."""
    folder = tmp_path_factory.mktemp("rehearsal") / "new folder"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = subprocess.run(["bash", SCRIPT, "--rehearse", folder], env={**os.environ, "PATH": path},
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return {file.name: json.loads(file.read_text()) for file in folder.iterdir()}


def test_it_measures_all_that_is_asked(rehearsed):
    assert rehearsed.keys() == {"gpu-11b-decode.json", "gpu-11b-transformers.json", "gpu-11b-table2.json"}
    decode = rehearsed["gpu-11b-decode.json"]
    measured = {((row["pruner"] or "none").partition(",")[0], row["weights"], row["batch"], row["how"])
                for row in decode["quantized"]}
    assert measured == {(method, weights, batch, how) for method in ("none", "trimmed_llama", "coreset")
                        for weights in ("in full", "int8", "int4")
                        for batch in (1, 2) for how in ("eager", "compiled")}
    assert all(row["fraction_of_ceiling"] > 0 and row["tokens_per_second"] > 0 for row in decode["quantized"])
    assert len(decode["compiled"]) == 18 and max(each["graphs"] for each in decode["compiled"]) == 6
    assert all(each["tokens"] == 3 * each["batch"] for each in decode["compiled"])
    beside = {row["component"] for row in rehearsed["gpu-11b-transformers.json"]["rows"] if row["ratio"]}
    assert beside >= {"encode", "first_token"}
    table = {(row["method"], row["keep"]) for row in rehearsed["gpu-11b-table2.json"]["rows"]}
    assert table == {("none", 1.0), ("random", 0.509), ("random", 0.396), ("trimmed_llama", 0.396),
                     ("coreset", 0.396)}


def test_an_unknown_argument_is_one_line():
    made = subprocess.run(["bash", SCRIPT, "--quickly"], capture_output=True, text=True)
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and "--quickly" in made.stderr
