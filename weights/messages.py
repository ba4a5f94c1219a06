"""Words for error messages: somebody else's text becomes part of one line of bounded length."""


def one_line(words: object, most: int = 300) -> str:
    """An error, or any text, on one line of at most `most` characters that every terminal can print."""
    text = " ".join(str(words).split()) or type(words).__name__
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most + 1])
    return text if len(text) <= most else text[:most - 1] + "…"


def quoted(value: object, most: int = 80) -> str:
    """A value as the user could have written it, cut where it is long: for "X is ..., but must be ...".

    Neither a number of a million digits nor a nested list can make it fail.
    """
    try:
        return one_line(repr(value), most)
    except (ValueError, RecursionError):        # Python refuses to write out very long whole numbers
        return f"a {type(value).__name__} too large to print"
