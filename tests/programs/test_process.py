"""How a program starts and ends as a process, where only that shows the fault."""
import os
import signal
import subprocess
import sys

import pytest
from program_inputs import PROGRAMS, QUESTION, ROOT


def start(*args: str, script: str = "generate.py", stdin: int = subprocess.DEVNULL,
          **variables: str) -> subprocess.Popen:
    """A program in a folder that is not its own, with no GPU in sight."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONIOENCODING": "utf-8", **variables}
    return subprocess.Popen([sys.executable, str(ROOT / script), *args], stdin=stdin, stdout=subprocess.PIPE,
                            cwd="/", stderr=subprocess.PIPE, env=environment, text=True, encoding="utf-8")


@pytest.mark.parametrize("module", PROGRAMS)
def test_an_interrupt_during_the_imports_is_no_traceback(tmp_path, module):
    """torch is one that takes a minute to import."""
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    process = start(*QUESTION, script=f"{module}.py", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")


def test_as_a_process():
    process = start(*QUESTION)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out == "Y\n"
    assert err.startswith("tiny: ") and "image tokens 200 slots -> 200 real" in err and "tok/s" in err
    assert len(err.splitlines()) == 3
