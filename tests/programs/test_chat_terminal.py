"""The chat on a real terminal: its line editor, Ctrl-C, and what goes to stdout and stderr."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from program_inputs import IMAGE, ROOT
from terminals import BACKSPACE, CTRL_D, LEFT, UP, Terminal

ENDLESS = '''
import time
from pruning import Pruner

class Endless(Pruner):
    """Every answer is "bbb..." and does not end."""
    def logits(self, logits):
        time.sleep(0.02)
        logits[:, 65] = 1e4
        return logits
'''


@pytest.fixture
def endless(tmp_path) -> str:
    (tmp_path / "endless.py").write_text(ENDLESS)
    return f"{tmp_path / 'endless.py'}:Endless"


def test_a_chat_as_a_person_has_it(endless):
    chat = Terminal("--image", IMAGE, "--max-new-tokens", "500")
    chat.wait_for("> ")
    chat.type("What is written on the cXrcle?" + LEFT * 5 + BACKSPACE + "i\n")      # edited in the middle
    chat.wait_for("Y\nimage tokens")
    assert "200 real\n" in chat.wait_for("\n> ")
    chat.type(UP)                                                                   # the same once more
    chat.wait_for("What is written on the circle?")
    chat.type("\n")
    chat.wait_for("tok/s")
    chat.wait_for("\n> ")

    chat.type(f"/image {ROOT / 'examples' / 'wide.png'}\n")
    assert re.search(r"image 2: 323 x 97 pixels, 150 image tokens, encode \d+ ms", chat.wait_for("\n> "))
    chat.type("What does the sign say?\n")
    chat.wait_for("111\nimage tokens")
    assert "400 slots -> 350 real -> 150 in sight" in chat.wait_for("\n> ")

    chat.type(f"/prune {endless} 0.5\n")
    chat.wait_for("image tokens are pruned from here on: endless, keep 0.5\n> ")
    chat.type("And now?\n")
    chat.wait_for("bbbbb")
    assert re.fullmatch(r"b*\^C\nstopped; what it said [^\n]*", chat.interrupt("\n> "))
    chat.type("half a line")
    chat.wait_for("half a line")
    assert chat.interrupt("\n> ").strip() in ("", "^C")                             # the line is cleared
    chat.type("/prune off\n/clear\n")
    chat.wait_for("forgotten; what remains: 1 image\n> ")
    chat.type("What is written on the circle?\n")
    chat.wait_for("Y\nimage tokens")
    assert "200 slots -> 200 real\n" in chat.wait_for("\n> ")
    chat.interrupt("")                                                              # at an empty prompt
    assert chat.end() == 130 and "Traceback" not in chat.seen


def test_only_answers_are_in_a_file(tmp_path, endless):
    chat = Terminal("--image", IMAGE, "--prune", endless, "--keep", "0.5", "--stop", "bbbbb",
                    stdout=tmp_path / "out.txt")
    chat.wait_for("> ")
    chat.type("What iss" + BACKSPACE + " this?\n")
    chat.wait_for("\nimage tokens 200")
    chat.wait_for("\n> ")
    chat.type(UP)
    chat.wait_for("What is this?")
    chat.type("\n")
    chat.wait_for("tok/s")
    chat.wait_for("\n> ")
    pasted = "\x1b[200~two\nlines\x1b[201~"
    for odd in "caf\udce9?", "nul\0?", pasted:               # a byte that is no UTF-8: the editor drops it
        chat.type(odd + "\n")
        chat.wait_for("tok/s")
        chat.wait_for("\n> ")
    chat.type(CTRL_D)
    assert chat.end() == 0
    assert (tmp_path / "out.txt").read_text() == "\n" * 5


def test_nothing_but_questions_and_answers_on_the_screen(tmp_path):
    chat = Terminal("--image", IMAGE, stderr=tmp_path / "err.txt")
    chat.type("What is written on the circlX" + BACKSPACE + "e?\n")
    chat.wait_for("circle?\nY\n")
    chat.type("\n")
    assert chat.end() == 0 and chat.seen.strip() == ""
    err = (tmp_path / "err.txt").read_text()
    assert err.startswith("tiny: ") and err.count("> ") >= 2 and "tok/s" in err


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed; the tests above need none")
def test_what_the_screen_of_a_terminal_shows(tmp_path, endless):
    """tmux draws it: no escape codes, and no prompt in the middle of a line."""
    def tmux(*args: str) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "CUDA_VISIBLE_DEVICES": "", "INPUTRC": "/dev/null"}
        return subprocess.run(["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null", *args], check=True,
                              env=environment, capture_output=True, text=True).stdout

    def wait_for(pattern: str) -> str:
        until = time.monotonic() + 60
        while not re.search(pattern, screen := tmux("capture-pane", "-p", "-S", "-100"), re.M):
            assert time.monotonic() < until, (pattern, screen)
            time.sleep(0.1)
        return screen

    program = shlex.join([sys.executable, str(ROOT / "generate.py"), "--image", IMAGE])
    tmux("new-session", "-d", "-x", "100", "-y", "50", program)
    try:
        wait_for(r"^>")
        tmux("send-keys", "What is written on the cXrcle?", *["Left"] * 5, "BSpace", "i", "Enter")
        wait_for(r"^> What is written on the circle\?\nY\n(.*\n)+>")
        tmux("send-keys", "/im", "Tab", str(ROOT / "examples" / "wid"), "Tab", "Enter")
        wait_for(r"image 2: 323 x 97 pixels.*\n>")
        tmux("send-keys", f"/prune {endless} 0.5", "Enter")
        wait_for(r"^image tokens are pruned")
        tmux("send-keys", "And now?", "Enter")
        wait_for(r"^bbbbb")
        tmux("send-keys", "C-c")
        screen = wait_for(r"^b+\^C\nstopped; what it said.*\n>")
        assert "^[" not in screen and "\n> And now?\n" in screen
    finally:
        tmux("kill-server")
