"""How a program starts and ends: messages on stderr, and errors of one line.

stdout belongs to answers and tables, stderr to everything about them. A program calls `begin` before it
imports torch, which takes seconds, so only what Python has loaded anyway is imported at the top here. At its
end it calls `run`.
"""
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

MOST_LETTERS = 1000         # of an error message


def begin(module: str):
    """Silence a warning of torch's import. In the program itself, make Ctrl-C end it without a traceback.

    `module` is the caller's `__name__`: whoever imports it as a library keeps their own way with Ctrl-C.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    if module != "__main__":
        return
    reserve_descriptors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end_at_once(number: int, frame: object):
    """For Ctrl-C before and after `run`: the exit code that a shell gives to a program which it ended."""
    os._exit(130)


def run(command: Callable, arguments: Callable, together: bool = False):
    """`command(arguments())`; errors become one line on stderr and exit code 2, as `fail` does.

    Ctrl-C ends it with exit code 130, a reader of stdout that has gone away with 141, both without a word.
    A pruner of the user's own is a program: where it fails, its author gets the traceback. `together` says
    that the program can run in several processes (`weights/ranks.py`).
    """
    if processes() > 1:
        run_with_others(command, arguments, together)
    else:
        run_alone(command, arguments)


def run_alone(command: Callable, arguments: Callable):
    """`run` in one process."""
    early = signal.getsignal(signal.SIGINT) is end_at_once
    if early:
        signal.signal(signal.SIGINT, signal.default_int_handler)     # files are closed and removed first
    reserve_descriptors()
    check_streams()
    try:
        try:
            command(arguments())
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        discard_output()
        raise SystemExit(141) from None
    except Exception as error:
        if not is_of_the_user(error) or is_in_a_pruner_of_the_user(error):
            claim_the_word()
            raise
        discard_output()
        fail(words_of(error))
    finally:
        if early:
            signal.signal(signal.SIGINT, end_at_once)


# ----- several processes, which torchrun starts


def processes() -> int:
    """How many of them there are; 1 without torchrun, also where others have set some of its variables."""
    whole = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if whole and number.isdigit() else 1


def run_with_others(command: Callable, arguments: Callable, together: bool):
    """`run` in one process of several: rank 0 speaks, of those that fail the first one, and Ctrl-C ends all.

    Each ends at once: Python's own way out may wait for the others.
    """
    reserve_descriptors()
    signal.signal(signal.SIGINT, end_at_once)
    if os.environ["RANK"] != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")   # noqa: SIM115
    code: object = 0
    try:
        if not together:
            fail("torchrun is for generate.py and evaluate.py: start this program with python")
        run_alone(command, arguments)
        from weights.ranks import leave  # here, because it imports torch

        leave()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in sys.stdout, sys.stderr:
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0)


def claim_the_word():
    """Of several processes that fail, the first may say why; the others, which fail because it did, or of the
    same fault, end here."""
    if processes() == 1:
        return
    from weights.ranks import is_first  # here, because it imports torch

    if not is_first("failure"):
        raise SystemExit(2)
    sys.stderr = sys.__stderr__


# ----- streams


def reserve_descriptors():
    """Give closed standard streams the null device, or the next open file would take their place."""
    for descriptor in 0, 1, 2:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                      # takes the lowest number that is free


def check_streams():
    """Make sure that stderr and stdout can be written; what is said to a closed stderr goes nowhere."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")    # noqa: SIM115  open until the program ends
    if sys.stdout is None:
        fail("standard output is closed, so the answer would be lost: use > /dev/null if that is meant")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # what its encoding lacks is escaped


def discard_output():
    """What could not be written to stdout must not raise an error again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ----- errors


def is_of_the_user(error: Exception) -> bool:
    """Whether an error comes from what the user passed, or from the machine. Others are faults of ours."""
    kinds = ValueError, OSError, OverflowError, RecursionError
    return isinstance(error, kinds) or is_out_of_memory(error) or is_of_other_processes(error)


def is_of_other_processes(error: Exception) -> bool:
    """Whether another process of this run has ended, or does not answer; gloo has no class for that."""
    words = "gloo", "nccl", "store", "process group"
    return processes() > 1 and isinstance(error, RuntimeError) and (
        type(error).__name__.startswith("Dist") or any(word in str(error).lower() for word in words))


def is_out_of_memory(error: Exception) -> bool:
    """Memory that runs out is a RuntimeError in torch, on CUDA one of a kind of its own."""
    words = "out of memory", "can't allocate memory", "not enough memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def is_in_a_pruner_of_the_user(error: Exception) -> bool:
    """Whether a class of FILE.py:CLASS failed at work. Its options are checked in `pruning.load`."""
    functions = []
    step = error.__traceback__
    while step is not None:
        frame = step.tb_frame
        functions.append((str(frame.f_globals.get("__name__")), frame.f_code.co_name))
        step = step.tb_next
    if ("pruning", "load") in functions:
        return False
    return any(module.endswith(".py") for module, _ in functions)


def words_of(error: Exception) -> str:
    """What to say of an error."""
    if is_out_of_memory(error):
        return f"out of memory: try a smaller model, --dtype bf16, or less at once ({error or 'MemoryError'})"
    if is_of_other_processes(error):
        return ("another process of this run has ended, or did not answer in time: look at what it said, and "
                "start all of them again")
    if isinstance(error, OSError):
        where = "reading or writing failed" if error.filename is None else error.filename
        return f"{where}: {error.strerror or error}"
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}): give a smaller one"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply ({error}): look at the files that you named"
    return str(error)


# ----- messages


def write(text: str):
    print(text, end="", flush=True)


def say(text: str, end: str = "\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def fail(message: object):
    """One line on stderr of bounded length, exit code 2."""
    from weights.messages import one_line  # here, because it imports torch

    claim_the_word()
    words = [word if len(word) < 250 else f"{word[:60]}…{word[-60:]}" for word in str(message).split()]
    try:
        say(f"error: {one_line(' '.join(words), MOST_LETTERS)}")
    except OSError:                                             # stderr is full or gone: nobody can be told
        sys.stderr = None                                       # and Python need not try again at its end
    raise SystemExit(2)
