"""What the peer of the benchmark refuses, each in one line that says what to do."""
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import random_tiles, randomise
from peer_models import SHAPES, TEXT, make, prompts

from benchmarks.peer import Peer, PeerImage
from model.config import Config
from model.llama_vision import LlamaVision


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def plain() -> tuple[LlamaVision, dict[bool, Peer]]:
    return make("plain")


@pytest.mark.parametrize(("package", "words"), [
    (None, "which is missing"), (SimpleNamespace(__version__="5.17.3"), "transformers 5.17.3 is too old"),
    (SimpleNamespace(__version__="4.57.1"), "is too old")], ids=["missing", "5.17.3", "4.57.1"])
def test_without_transformers(monkeypatch, package, words):
    ours = randomise(LlamaVision(SHAPES["plain"]), SHAPES["plain"].vision, seed=1)
    monkeypatch.setitem(sys.modules, "transformers", package)
    with pytest.raises(ValueError, match=words) as error:
        Peer(ours)
    assert "pip install" in str(error.value) and "\n" not in str(error.value)


def test_bad_input(plain):
    ours, peers = plain
    peer = peers[False]
    ids, states = prompts(ours.config, 3), peer.encode(random_tiles([(1, 1)] * 2, ours.config.vision)).states
    for given_states, grids, lengths, words in (
            (states, [(1, 1)], [11] * 3, "2 encoded images for 3 sequences with 1"),
            (states, [(1, 1)] * 2, [11] * 3, "sequence 0 has 1 image tokens in its text but 2"),
            (states[:0], [], [11] * 3, "0 encoded images"),
            (states[:1], [(1, 1)], [11, 9, 10], "prompts of 9 to 11 tokens")):
        with pytest.raises(ValueError, match=words) as error:
            peer.prefill(ids, lengths, PeerImage(given_states, grids), 1)
        assert "\n" not in str(error.value)


def test_an_embedding_that_transformers_does_not_load_is_refused():
    """After its own resize_token_embeddings, both have one length, and it does not load what it has saved."""
    config = Config(SHAPES["plain"].vision, replace(TEXT, extra_embeddings=0), 20)
    with pytest.raises(ValueError, match="must have 8 rows more than its head, and this one has 0"):
        Peer(LlamaVision(config))


def test_cross_attention_in_the_first_layer_is_refused():
    """Its masks are as long as the cache of the first layer, there the image's."""
    config = Config(SHAPES["plain"].vision, replace(TEXT, cross_attention_layers=(0, 3)), 60)
    with pytest.raises(ValueError, match="cannot decode where the first layer is a cross-attention layer"):
        Peer(LlamaVision(config))
