"""What a person names as an image becomes an RGB image: a path, a URL, a data URI, or `-` for standard input.

    source ── within bounds of bytes, time and redirects ─► bytes ── image_file.py ─► RGB image

Only http and https are fetched, also after a redirect: no address on the web may lead to a file of this
machine. Addresses of this machine and its network are as good as any: whoever runs a program may ask them.
Whatever is wrong is one ValueError of one line, which names the source and says what to do.
"""
import base64
import binascii
import http.client
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

from PIL import Image

from weights.image_file import MAX_BYTES, open_image
from weights.messages import named, one_line

MOST_FETCHED = 2 ** 26          # bytes of an image from the web
MOST_SECONDS = 60.0             # for all of it, redirects included
MOST_SILENCE = 20.0             # seconds without a byte
MOST_REDIRECTS = 5
REDIRECTS = 301, 302, 303, 307, 308
HEADERS = {"User-Agent": "trimmed-llama/0.1 (fetches one image for a person)", "Accept": "image/*,*/*;q=0.5"}
URL = re.compile(r"https?:/", re.IGNORECASE)
DATA = re.compile(r"data:", re.IGNORECASE)
KEEP = "/?:@!$&'()*+,;=%~-._[]"     # what may stand in a URL as it is; all else is percent-encoded


def images_from(sources: list[str]) -> list[Image.Image]:
    """`image_from` for each source."""
    if sources.count("-") > 1:
        raise ValueError("- is there twice, but standard input holds one image; give a path for the other")
    return [image_from(source) for source in sources]


def image_from(source: str) -> Image.Image:
    """The RGB image, as `open_image` gives it, of a path, an http(s) URL, a data URI, or "-".

    Raises ValueError with one line. A file of such a name is read as "./-" or "./data:x".
    """
    if is_path(source):
        return open_image(source)
    name, read = _reader(source)
    try:
        return open_image(read(), name)
    except MemoryError:
        raise ValueError(f"{name}: this machine has too little memory to read it") from None


def is_path(source: str) -> bool:
    """Whether this names a file."""
    return source != "-" and not URL.match(source) and not DATA.match(source)


def _reader(source: str) -> tuple[str, Callable[[], bytes]]:
    """How messages call a source that is no path, and what reads it."""
    if source == "-":
        return "standard input", _from_stdin
    if DATA.match(source):
        name = one_line(source, 40)
        return name, lambda: _from_data(name, source)
    return named(source), lambda: fetch(source)


def _from_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("standard input: nothing is piped in; use < FILE, or give a path instead of -")
    return sys.stdin.buffer.read(MAX_BYTES + 1)


def _from_data(name: str, source: str) -> bytes:
    """The content of "data:[type][;base64],content" (RFC 2397). Raises ValueError with one line."""
    head, comma, content = source.partition(",")
    if not comma:
        raise ValueError(f"{name}: no comma, which ends its type; write data:image/png;base64,CONTENT")
    data = urllib.parse.unquote_to_bytes(content.encode(errors="surrogateescape"))
    if not head.lower().rstrip().endswith(";base64"):
        return data
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}: its content is not valid base64; encode the image again") from None


# ----- from the web


def fetch(url: str) -> bytes:
    """The content of an http(s) URL: at most MOST_FETCHED bytes within MOST_SECONDS. Raises ValueError.

    A thread fetches, because nothing else bounds the time of a name server, or of a server that sends a byte
    now and then.
    """
    download = _Download(url)
    thread = threading.Thread(target=download.run, daemon=True)
    thread.start()
    thread.join(MOST_SECONDS)
    if thread.is_alive():
        download.given_up = True
        raise ValueError(f"{named(url)}: not there after {MOST_SECONDS:.0f} seconds; download it first")
    if download.error is not None:
        raise download.error
    return download.content


class _Download:
    """One fetch, made in a thread of its own: `content`, or the `error` to raise."""

    def __init__(self, url: str):
        self.url = url
        self.given_up = False
        self.content = b""
        self.error: Exception | None = None

    def run(self):
        try:
            self.content = self.follow()
        except ValueError as error:
            self.error = ValueError(f"{named(self.url)}: {one_line(error)}")
        except (OSError, http.client.HTTPException) as error:
            self.error = ValueError(f"{named(self.url)}: cannot be fetched ({_why(error)}); check the "
                                    "address and the connection, or download it first")
        except Exception as error:          # a fault of ours belongs to the caller, not to a thread that ends
            self.error = error

    def follow(self) -> bytes:
        """The content at the end of the redirects."""
        url = self.url
        for _ in range(MOST_REDIRECTS + 1):
            with _opener().open(urllib.request.Request(_quoted(url), headers=HEADERS),
                                timeout=MOST_SILENCE) as response:
                target = response.headers.get("Location")
                if response.status not in REDIRECTS or target is None:
                    return self.read(response)
            url = urllib.parse.urljoin(url, target)
            if not URL.match(url):
                raise ValueError(f"it leads to {named(url, 80)}, but only http and https are followed")
        raise ValueError(f"it leads on to another address over {MOST_REDIRECTS} times; download it first")

    def read(self, response: http.client.HTTPResponse) -> bytes:
        """The body, as long as it is short enough; what its header says of the size is not believed."""
        if not 200 <= response.status < 300:
            raise ValueError(f"the server answers {response.status} {one_line(response.reason or '', 60)}; "
                             "check the address")
        content = bytearray()
        while piece := response.read1(2 ** 16):
            content += piece
            if len(content) > MOST_FETCHED:
                raise ValueError(f"over {MOST_FETCHED // 2 ** 20} MiB; download it and make it smaller first")
            if self.given_up:
                raise TimeoutError("nobody waits for it any more")
        if response.length:
            raise ValueError(f"the connection broke off, {response.length:,} bytes too early; try again")
        is_page = response.headers.get_content_type() == "text/html"
        if is_page and content[:1000].lstrip()[:1] == b"<":
            raise ValueError("a web page, not an image; give the address of the image itself")
        return bytes(content)


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https, also through the proxies of the environment, and nothing else: urllib's own
    opener also reads files and FTP, and follows redirects without a limit of bytes."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                    urllib.request.UnknownHandler):
        opener.add_handler(handler())
    return opener


def _quoted(url: str) -> str:
    """A URL as people paste it, with what a request cannot hold percent-encoded. Raises ValueError."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or parts.port == 0:           # to ask for the port checks it
        raise ValueError("no server in this address; write https://SERVER/IMAGE")
    if "@" in parts.netloc:
        raise ValueError("an address with a name or password in it; download it first")
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    path = urllib.parse.quote(parts.path or "/", KEEP, errors="surrogateescape")
    return urllib.parse.urlunsplit((parts.scheme, host, path,
                                    urllib.parse.quote(parts.query, KEEP, errors="surrogateescape"), ""))


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer within {MOST_SILENCE:.0f} seconds"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(words or type(error).__name__, 120)
