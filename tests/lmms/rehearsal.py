"""Real commands of lmms-eval and of ours, offline, in a folder with fake data."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUESTIONS = 32
TASKS = "scenes,seedbench_image,mme,mmvp,llava_in_the_wild"
PRUNED = "trimmed_llama", "0.25", "full_layers=0"
WHOLE = "none", "1.0"


@dataclass
class Workplace:
    """A folder with data sets and, below it, what the commands wrote."""
    folder: Path
    environment: dict[str, str]

    def start(self, method: str, keep: str, *options: str, batch: int) -> subprocess.Popen:
        """The command of one row, in a group of processes of its own."""
        environment = {**self.environment, "MODEL": "tiny", "OUT": "runs", "TASKS": TASKS,
                       "BATCH": str(batch)}
        script = ROOT / "evaluation" / "lmms" / "scripts" / "row.sh"
        return subprocess.Popen([str(script), method, keep, *options], cwd=self.folder, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)

    def python(self, *arguments: str) -> subprocess.Popen:
        """A program of ours, from the checkout."""
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=self.environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / "tiny" / name


def finished(process: subprocess.Popen) -> str:
    """The output of a command that ended well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


@contextmanager
def judge(environment: dict[str, str]) -> Iterator[str]:
    """The address of a judge on 127.0.0.1."""
    process = subprocess.Popen([sys.executable, "-m", "evaluation.lmms.loopback_judge", "--port", "0"],
                               cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def kill_in_the_middle(process: subprocess.Popen, record: Path):
    """With kill -9, when some questions have been answered and others not."""
    lines = 0
    while lines <= 16:
        assert process.poll() is None, process.communicate()[0][-3000:]
        lines = record.read_bytes().count(b"\n") if record.exists() else 0
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(record.parent.rglob("*_results.json"))
