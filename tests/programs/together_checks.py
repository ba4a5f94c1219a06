"""What a rank does for test_together.py."""
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial

import benchmark
import evaluate
import generate
from weights.ranks import join

PROGRAMS = {"generate": generate, "evaluate": evaluate, "benchmark": benchmark}


def start(program: str, *args: str):
    """A program with these arguments; RANK in them is this rank."""
    sys.argv = [f"{program}.py", *(arg.replace("RANK", os.environ["RANK"]) for arg in args)]
    PROGRAMS[program].main()


def killed(*args: str):
    """Rank 1 is killed at work."""
    if os.environ["RANK"] == "1":
        generate.Assistant.encode_images = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    start("generate", *args)


def stuck(*args: str):
    """Rank 1 does nothing any more; the others do not wait for longer than they have patience."""
    generate.join = partial(join, timeout=timedelta(seconds=1))
    if os.environ["RANK"] == "1":
        generate.Assistant.encode_images = lambda *_: time.sleep(4) or os._exit(0)
    start("generate", *args)
