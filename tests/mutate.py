"""Damages thousands of files and reads them: `python tests/mutate.py --files 20000 --seed 0`.

    good files ── mutations.py ─► damaged files ── file_kinds.py: the programs' readers ─► read, or refused

A file may be read, or be refused by a ValueError of one printable line of at most 1000 characters. All else
is a failure: another exception, a dead process, more than 10 s of work, more memory than its kind may take,
anything on stdout. Every failure is printed with a command that repeats it alone; the exit code is then 1.

The files are read in worker processes that are forked from this one, so this runs on Linux (and macOS, where
memory is not measured).
"""
import argparse
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"      # its threads do not survive a fork

from file_kinds import KINDS  # noqa: E402
from good_files import Files  # noqa: E402
from mutations import mutated  # noqa: E402

from weights.messages import one_line  # noqa: E402

MOST_MESSAGE = 1000                 # characters
MOST_SECONDS = 10                   # of work; a machine may be busy with other things, so not of time
MOST_WAITING = 100                  # seconds
ADDRESS_SPACE = 4 * 2 ** 30         # bytes beyond what a worker has at first: protects the machine
Case = tuple[str, int]              # kind and number


@dataclass
class Outcome:
    """How reading one case ended: "read", "refused" or "failed", and in which words."""
    end: str
    words: str = ""
    seconds: float = 0
    memory: int = 0                 # bytes


# ----- one case


@cache
def folders(kind: str) -> list[Files]:
    return KINDS[kind].make_folders()


def make_case(kind: str, number: int, seed: int) -> Files:
    """The files of a case: a good folder in which one file, or two, are damaged, or one is missing."""
    rng = Random(f"{seed}/{kind}/{number}")
    files = dict(rng.choice(folders(kind)))
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(list(files))
        other = rng.choice(list(rng.choice(folders(kind)).values()))
        files[name] = mutated(rng, name, files[name], other)
    if rng.random() < 0.01:
        del files[rng.choice(list(files))]
    return files


def write_files(files: Files, folder: Path):
    for name, content in files.items():
        (folder / name).write_bytes(content)


def try_case(kind: str, number: int, seed: int, folder: Path) -> Outcome:
    """Write the files of a case into an empty folder, and read them there."""
    write_files(make_case(kind, number, seed), folder)
    before = memory("VmRSS")
    forget_peak()
    began = time.process_time()
    set_deadlines(MOST_SECONDS, MOST_WAITING)
    try:
        KINDS[kind].read(folder)
        outcome = Outcome("read")
    except BaseException as error:          # a library's panic is not an Exception
        outcome = judged(error)
    set_deadlines(0, 0)
    outcome.seconds = time.process_time() - began
    outcome.memory = max(0, memory("VmHWM") - before)
    sys.stdout.flush()
    if os.fstat(1).st_size:
        os.ftruncate(1, 0)
        return Outcome("failed", "it printed something on stdout")
    if outcome.memory > KINDS[kind].memory:
        return Outcome("failed", f"it took {outcome.memory / 1e6:.0f} MB of memory")
    return outcome


def judged(error: BaseException) -> Outcome:
    """Whether this error is a good refusal."""
    words = str(error)
    if type(error) is ValueError and words.isprintable() and 0 < len(words) <= MOST_MESSAGE:
        return Outcome("refused", words)
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if frame.filename.startswith(str(ROOT))][-1]
    where = f"{Path(last.filename).relative_to(ROOT)}:{last.lineno}"
    short = f"{one_line(words, 200)} ({len(words)} characters)"
    return Outcome("failed", f"{type(error).__name__} at {where}: {short}")


def set_deadlines(work: float, waiting: float):
    """The system ends this process after so many seconds, whatever it does then; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, work)
    signal.setitimer(signal.ITIMER_REAL, waiting)


def forget_peak():
    """Let the kernel count the peak of this process's memory anew."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 on systems that have none."""
    if not os.path.exists("/proc/self/status"):
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


# ----- worker processes


class Worker:
    """A process that tries one case after another. Its stdout and stderr are files in `home`."""

    def __init__(self, home: Path, seed: int):
        home.mkdir()
        self.home = home
        self.case: Case | None = None
        self.connection, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=serve, args=(theirs, home, seed), daemon=True)
        self.process.start()
        theirs.close()                      # so that reading from it ends when the process does

    def give(self, case: Case | None):
        """The next case; None ends the process."""
        self.case = case
        self.connection.send(case)

    def result(self) -> Outcome:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
        code = self.process.exitcode
        death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        deadlines = {"SIGPROF": f"over {MOST_SECONDS} s of work", "SIGALRM": f"over {MOST_WAITING} s"}
        said = one_line((self.home / "stderr").read_text(errors="replace")[-200:])
        return Outcome("failed", deadlines.get(death, f"the process died: {death}; {said}"))


def serve(connection: Connection, home: Path, seed: int):
    """What a worker process does."""
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(home / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
        stream = open(descriptor, "w", closefd=False)       # noqa: SIM115  until the process ends
        setattr(sys, name, stream)
    for number in signal.SIGPROF, signal.SIGALRM:
        signal.signal(number, signal.SIG_DFL)       # ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent ends it
    if memory("VmSize"):
        most = memory("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while (case := connection.recv()) is not None:
        os.ftruncate(2, 0)
        with tempfile.TemporaryDirectory(dir=home) as folder:
            connection.send(try_case(*case, seed, Path(folder)))


def outcomes(cases: list[Case], seed: int, count: int, home: Path) -> Iterator[tuple[Case, Outcome]]:
    """Try all cases in so many workers; one that dies is replaced."""
    todo = iter(cases)
    workers = []
    started = 0
    while True:
        while len(workers) < count and (case := next(todo, None)) is not None:
            workers.append(Worker(home / str(started), seed))
            workers[-1].give(case)
            started += 1
        if not workers:
            return
        ready = wait([worker.connection for worker in workers])
        for worker in [worker for worker in workers if worker.connection in ready]:
            yield worker.case, worker.result()
            case = next(todo, None) if worker.process.is_alive() else None
            if case is None:
                workers.remove(worker)
            else:
                worker.give(case)


# ----- the program


def check_good_files(kind: str):
    """Every file that is not damaged is read; this also imports what reading needs, before the fork."""
    for files in folders(kind):
        with tempfile.TemporaryDirectory() as folder:
            write_files(files, Path(folder))
            KINDS[kind].read(Path(folder))


def report(kinds: list[str], results: dict[Case, Outcome], seed: int):
    print(f"{'kind':12} {'files':>7} {'read':>7} {'refused':>8} {'failed':>7} {'slowest':>8} {'memory':>8}")
    for kind in kinds:
        ended = {number: outcome for (name, number), outcome in results.items() if name == kind}
        count = Counter(outcome.end for outcome in ended.values())
        slowest = max((outcome.seconds for outcome in ended.values()), default=0)
        most = max((outcome.memory for outcome in ended.values()), default=0)
        print(f"{kind:12} {len(ended):7} {count['read']:7} {count['refused']:8} {count['failed']:7} "
              f"{slowest:6.1f} s {most / 1e6:5.0f} MB")
    for (kind, number), outcome in results.items():
        if outcome.end == "failed":
            print(f"{kind} {number}: {outcome.words}\n    "
                  f"python tests/mutate.py --seed {seed} --kind {kind} --only {number}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/mutate.py", description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20000, metavar="N", help="of all kinds; default 20000")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--kind", choices=list(KINDS), help="only files of this kind")
    parser.add_argument("--only", type=int, metavar="N", help="only this one of --kind; its files are kept")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default 2")
    args = parser.parse_args()
    if args.only is not None and args.kind is None:
        parser.error("--only needs a --kind")
    return args


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    kinds = list(KINDS) if args.kind is None else [args.kind]
    for kind in kinds:
        check_good_files(kind)
    shares = sum(KINDS[kind].share for kind in kinds)
    cases = [(kind, i) for kind in kinds for i in range(round(args.files * KINDS[kind].share / shares))]
    if args.only is not None:
        cases = [(args.kind, args.only)]
        kept = tempfile.mkdtemp(prefix="mutate-")
        write_files(make_case(args.kind, args.only, args.seed), Path(kept))
        print(f"its files: {kept}")
    results = {}
    with tempfile.TemporaryDirectory() as home:
        for case, outcome in outcomes(cases, args.seed, args.workers, Path(home)):
            results[case] = outcome
            if sys.stderr.isatty():
                print(f"\r{len(results)} of {len(cases)} ", end="", file=sys.stderr)
    if args.only is not None:
        print(f"{outcome.end}: {outcome.words}")
    report(kinds, results, args.seed)
    return int(any(outcome.end == "failed" for outcome in results.values()))


if __name__ == "__main__":
    sys.exit(main())
