"""demo.py from the command line: what it needs, where it is served, and what it says when it cannot be."""
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest

import demo
from page.desk import Desk


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line of a command that cannot be done. gradio is taken to be there: nothing gets as far."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))

    def command(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["demo.py", *argv])
        with pytest.raises(SystemExit) as end:
            demo.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err
    return command


def test_without_gradio_it_says_how_to_get_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused() == "error: the page needs gradio, which is not installed: pip install -e '.[demo]'\n"


def test_a_port_in_use(refused):
    with socket.socket() as other:
        other.bind((demo.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        err = refused("--port", str(port))
    assert f"--port {port}: cannot be used" in err and "0 for any" in err
    assert demo.free_port(port) == port


@pytest.mark.parametrize(("port", "words"), [("-1", "--port is -1"), ("65536", "--port is 65536"),
                                             ("x", "'x' is not a whole number"), ("1" * 30, "--port is 1")])
def test_no_port(refused, port, words):
    assert words in refused(f"--port={port}")


def test_any_port_is_a_free_one():
    assert 1024 <= demo.free_port(0) < 2 ** 16


def test_a_bad_model_is_one_line_too(refused):
    assert "nowhere" in refused("--model", "./nowhere", "--port", "0")


def test_it_serves_this_machine_only_and_asks_nobody(refused, monkeypatch):
    served = []

    def serve(desk: Desk, port: int):
        assert Path(os.environ["GRADIO_TEMP_DIR"]).is_dir()
        served.append((desk, port))

    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--port", "0"])
    demo.main()
    (desk, port), = served
    assert isinstance(desk, Desk) and desk.name == "tiny" and port > 0
    assert demo.HOST == "127.0.0.1" and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "127.0.0.1" in os.environ["NO_PROXY"]
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()
