"""What the tests of generate.py share: the bundled checkpoint, a drawn image, and the command line."""
import io
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import generate as program

ROOT = Path(__file__).parents[2]
TINY = ROOT / "weights" / "tiny"
STOP = 638                                          # <|eot_id|> of the bundled checkpoint
JSON_KEYS = {"answer", "token_ids", "image_tokens", "ms", "tokens_per_second", "image_kv_bytes",
             "text_kv_bytes", "peak_memory_bytes", "mapped_memory_bytes", "model", "pruner", "kept_by_layer",
             "answered_early", "image_kv_stored_bytes"}


def drawn(width: int, height: int) -> Image.Image:
    random_image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(random_image).ellipse((width // 4, height // 4, width // 2, height // 2), fill="red")
    return random_image


class Input(io.TextIOWrapper):
    """Standard input of given text or bytes: a pipe, or a terminal."""

    def __init__(self, text: str | bytes, terminal: bool):
        super().__init__(io.BytesIO(text if isinstance(text, bytes) else text.encode()), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def command_line(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Runs the command line on the CPU; returns what it wrote to stdout and stderr."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def command(*args: str, stdin: str | bytes = "", terminal: bool = False) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *args])
        monkeypatch.setattr(sys, "stdin", Input(stdin, terminal))
        program.main()
        return capsys.readouterr()
    return command


# A chat template that refuses a system message beside an image, as one of the official ones does.
REFUSING = """{% for m in messages %}{% for part in m.content %}
{%- if part.type == 'image' and messages[0].role == 'system' %}{{ raise_exception('refused') }}{% endif %}
{%- endfor %}{% endfor %}
{%- for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}
{{- '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}<|eot_id|>
{%- endfor %}<|start_header_id|>assistant<|end_header_id|>

"""


def refusing_checkpoint(folder: Path) -> str:
    """The bundled checkpoint with this template."""
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(REFUSING)
    return str(folder)
