"""Processes that work ahead, each in one thread: `python evaluate.py --jobs N`.

    numbers ─► whichever process is free ─► answers ─► in the order of the numbers

Several small models in one thread each are faster than one in several threads. A process ends when the one
that started it has ended, however that happened; Ctrl-C is only for the latter.
"""
import signal
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

import torch

Answer = Callable[[int], dict]


def ahead(jobs: int, prepare: Callable[..., Answer], args: tuple, numbers: range) -> Iterator[dict | None]:
    """The answers to all numbers, in order, of processes that call `prepare(*args)` for what answers them.

    None is for a number that failed: answer it yourself, and the error is raised where it belongs. Close the
    iterator to end the processes. Raises ValueError if one of them has died.
    """
    processes = {}
    answers = {}
    left = iter(numbers)
    try:
        for _ in range(min(jobs, len(numbers))):
            connection, process = start(prepare, args)
            processes[connection] = process
            connection.send(next(left))
        for number in numbers:
            while number not in answers:
                for connection in wait(list(processes)):
                    done, answers[done] = connection.recv()
                    if (following := next(left, None)) is not None:
                        connection.send(following)
            yield answers.pop(number)
    except (EOFError, ConnectionError):
        raise ValueError("a process of --jobs has died, perhaps for lack of memory: give fewer jobs; with "
                         "--json the same command goes on from here") from None
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def start(prepare: Callable[..., Answer], args: tuple) -> tuple:
    """Our end of the connection to a new process, and the process."""
    context = get_context("spawn")              # a fork of a process with threads may hang
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, prepare, args), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)      # which the new process inherits
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    theirs.close()                              # or its end would not be seen
    return ours, process


def serve(connection: Connection, prepare: Callable[..., Answer], args: tuple):
    """Answer numbers until nobody asks any more."""
    torch.set_num_threads(1)
    answer = prepare(*args)
    try:
        while True:
            number = connection.recv()
            try:
                answered = answer(number)
            except Exception:                   # told by whoever asks again, in its own traceback
                answered = None
            connection.send((number, answered))
    except (EOFError, ConnectionError):
        return
