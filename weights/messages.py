"""Words for error messages: somebody else's text becomes part of one line of bounded length."""
from argparse import ArgumentParser
from collections.abc import Callable


def one_line(words: object, most: int = 300) -> str:
    """An error, or any text, on one line of at most `most` characters that every terminal can print."""
    text = " ".join(str(words).split()) or type(words).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most + 1])
    return text if len(text) <= most else text[:most - 1] + "…"


def quoted(value: object, most: int = 120) -> str:
    """A value as the user could have written it, cut where it is long: for "X is ..., but must be ...".

    Neither a number of a million digits nor a nested list can make it fail.
    """
    try:
        return one_line(repr(value), most)
    except (ValueError, RecursionError):        # Python refuses to write out very long whole numbers
        return f"a {type(value).__name__} too large to print"


def named(path: object, most: int = 200) -> str:
    """A path as it is shown: printable, and cut at its front where it is long: the end tells most."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path)[-most - 1:])
    return text if len(text) <= most else "…" + text[1 - most:]


def reason(error: OSError) -> str:
    """Why a system call failed, in the system's words and without the file's name."""
    return one_line(error.strerror or error)


def some(names: list[str]) -> str:
    """A few names for a message."""
    return ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")


def written(parser: ArgumentParser, out: str, write: Callable[[], object]) -> object:
    """What `write()` gives, in a command that writes OUT. Its errors end the command with one line and exit
    code 2, Ctrl-C ends it with 130."""
    try:
        return write()
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(2, f"error: {named(out)}: cannot be written ({reason(error)})\n")
    except KeyboardInterrupt:
        parser.exit(130)
