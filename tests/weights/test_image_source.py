"""Images by URL, as a data URI and from standard input: within bounds, and refused in one line."""
import base64
import io
import socket
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import refused
from image_helpers import noise, saved

from weights import image_source
from weights.image_source import image_from

PNG = saved(noise(5, 6), "PNG")


class Handler(BaseHTTPRequestHandler):
    """Answers by the path that is asked for."""

    def log_message(self, *_):
        """Say nothing."""

    def do_GET(self):
        name, _, query = self.path[1:].partition("?")
        self.server.asked.append(self.path)
        if name == "redirect":
            return self.head(302, ("Location", urllib.parse.unquote(query)))
        if name == "count":
            return self.head(302, ("Location", f"/count?{int(query) - 1}" if int(query) else "/a.png"))
        if name == "silent":
            return time.sleep(3)
        if name == "missing":
            return self.head(404)
        kind = "text/html" if name == "page" else "image/png"
        if name == "short":
            self.head(200, ("Content-Type", kind), ("Content-Length", str(2 * len(PNG))))
            return self.wfile.write(PNG)
        self.head(200, ("Content-Type", kind))
        if name == "page":
            self.wfile.write(b"\n<!doctype html><p>an image</p>")
        elif name in ("slow", "huge"):
            self.pour(b"x" * (1 if name == "slow" else 2 ** 14), 0.1 if name == "slow" else 0)
        elif name != "empty":
            self.wfile.write(b"not an image" if name == "text" else PNG)

    def head(self, status: int, *headers: tuple[str, str]):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.end_headers()

    def pour(self, piece: bytes, seconds: float):
        """Send without an end, until nobody listens."""
        try:
            for _ in range(1000):
                self.wfile.write(piece)
                time.sleep(seconds)
        except OSError:
            self.close_connection = True


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked = []
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def site(server, monkeypatch) -> str:
    """The server's address; nothing asks a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.asked.clear()
    return f"http://127.0.0.1:{server.server_port}"


def test_a_url_is_fetched_and_read(site, server):
    for path in "a.png", "A%20b.png?size=big", "HTTP/upper":
        assert image_from(f"{site}/{path}".replace("http:", "HTTP:")).size == (6, 5)
    assert server.asked == ["/a.png", "/A%20b.png?size=big", "/HTTP/upper"]


def test_an_address_is_sent_as_it_was_pasted(site, server):
    image_from(f"{site}/caf\u00e9 (1).png?a=\u2603&b=%C3%A9#part")
    assert server.asked == ["/caf%C3%A9%20(1).png?a=%E2%98%83&b=%C3%A9"]


@pytest.mark.parametrize(("path", "words"), [
    ("missing", ["404 Not Found", "check the address"]),
    ("page", ["a web page, not an image"]),
    ("text", ["not an image in a format"]),
    ("empty", [": empty"]),
    ("short", ["broke off", "too early"]),
    ("redirect?file:///etc/passwd", ["leads to file:///etc/passwd", "only http and https"]),
    ("redirect?ftp://127.0.0.1/a.png", ["leads to ftp://", "only http and https"]),
    ("redirect?data:image/png;base64,AAAA", ["leads to data:", "only http and https"]),
    ("redirect?/redirect", ["leads", "download it first"]),
    ("count?5", ["another address over 5 times"]),
])
def test_what_a_server_may_not_answer(site, path, words):
    with refused(parts=[f"{site}/{path}: ", *words]):
        image_from(f"{site}/{path}")


def test_a_few_redirects_are_followed(site, server):
    assert image_from(f"{site}/count?4").size == (6, 5)
    assert image_from(f"{site}/redirect?{urllib.parse.quote(site + '/b.png', safe='')}").size == (6, 5)
    assert len(server.asked) == 6 + 2


def test_bytes_are_counted_as_they_come(site, monkeypatch):
    monkeypatch.setattr(image_source, "MOST_FETCHED", 2 ** 20)
    with refused(parts=[f"{site}/huge: over 1 MiB", "smaller"]):
        image_from(f"{site}/huge")


def test_time_is_bounded_for_all_of_it(site, monkeypatch):
    """A byte now and then is never silence, but it takes too long."""
    monkeypatch.setattr(image_source, "MOST_SECONDS", 0.4)
    began = time.monotonic()
    with refused(parts=[f"{site}/slow: not there after", "download it first"]):
        image_from(f"{site}/slow")
    assert time.monotonic() - began < 3


def test_a_server_that_never_answers(site, monkeypatch):
    monkeypatch.setattr(image_source, "MOST_SILENCE", 0.2)
    with refused(parts=[f"{site}/silent: cannot be fetched (no answer within"]):
        image_from(f"{site}/silent")


def test_what_is_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with refused(parts=["cannot be fetched (Connection refused)", "check the address"]):
        image_from(f"http://127.0.0.1:{port}/a.png")


@pytest.mark.parametrize(("url", "words"), [
    ("http:///a.png", "no server"), ("https:/a.png", "no server"), ("http://a:b@127.0.0.1/", "password"),
    ("http://127.0.0.1:port/", "could not be cast"), ("http://[::1/a.png", "Invalid IPv6"),
    ("http://" + "x" * 70 + ".\u00e9/", "label"), ("http://127.0.0.1:99999/", "0-65535"),
])
def test_what_is_no_address(url, words):
    with refused(parts=[words]):
        image_from(url)


def test_data_uris():
    text = base64.b64encode(PNG).decode()
    for uri in (f"data:image/png;base64,{text}", f"DATA:;base64,{text.rstrip('=')}",
                f"data:image/png;base64,{urllib.parse.quote(text)}", f"data:,{urllib.parse.quote(PNG)}",
                f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
                f"data:image/png;base64, {text[:40]} {text[40:]}"):
        assert image_from(uri).size == (6, 5)


@pytest.mark.parametrize(("uri", "words"), [
    ("data:image/png;base64", "no comma"), ("data:image/png;base64,", "empty"),
    ("data:image/png;base64,iVBO", "not an image"), ("data:image/png;base64,\u00e9!", "not valid base64"),
    ("data:image/png;base64,AAAAA", "not valid base64"), ("data:text/html,<p>", "not an image"),
])
def test_data_uris_that_hold_no_image(uri, words):
    with refused(parts=["data:", words]):
        image_from(uri)


class Stdin(io.TextIOWrapper):
    def __init__(self, content: bytes, terminal: bool = False):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.isatty = lambda: terminal


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(PNG))
    assert image_from("-").size == (6, 5)
    for stdin in Stdin(PNG, terminal=True), None:
        monkeypatch.setattr(sys, "stdin", stdin)
        with refused("^standard input: nothing is piped in"):
            image_from("-")
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    with refused("^standard input: empty"):
        image_from("-")


def test_files_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "-", "data:x":
        (tmp_path / name).write_bytes(PNG)
        assert image_from(f"./{name}").size == (6, 5)
    with refused("no such file"):
        image_from("none.png")
