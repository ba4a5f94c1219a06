"""What the tests of this folder share: fixtures for generate.py's command line."""
import io
import sys
from collections.abc import Callable

import pytest
import torch
from generate_helpers import STOP, TINY, drawn
from tokenizers import Tokenizer

import generate as program
from generate import Sampler


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """The path of an image of two tiles."""
    path = tmp_path_factory.mktemp("images") / "wide.png"
    drawn(224, 112).save(path)
    return str(path)


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts of every call of generate() so far, as text with their special tokens."""
    calls, inner, tokenizer = [], program.generate, Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def spy(model, prompts, *rest):
        calls.append([tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts])
        return inner(model, prompts, *rest)

    monkeypatch.setattr(program, "generate", spy)
    return calls


@pytest.fixture
def say(monkeypatch) -> Callable[..., list[str]]:
    """Lets every answer be these words, spelt in several tokens; returns what stdout holds at each token."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def words(text: str, cut: int = 0) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        script, seen = [*ids[:len(ids) - cut], STOP], []

        def sample(sampler, logits):
            seen.append(sys.stdout.getvalue())
            return torch.full((len(logits),), script[(len(seen) - 1) % len(script)])

        monkeypatch.setattr(Sampler, "__call__", sample)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        return seen
    return words
