"""Where the model looked: the weights that it computed itself, by every method, and a Looker that changes
nothing.

What the network attends with is read off its own cross-attention layers, and made into weights by hand.
"""
import math
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import matrix_options
import pytest
import torch
from helpers import I, close, encode, refused, small_network, tile_coords
from reference import Run, forced, guide_like
from torch import Tensor

from generate import Assistant
from model.image_tokens import ImageKV, ImageTokens
from model.llama_vision import LlamaVision
from page import looks as looks_module
from page.looks import Look, Looker, Looks, index_of, words_of
from pruning import METHODS, Pruner, load
from weights.image_file import open_image
from weights.tokenizer import messages

KEEPS, OPTIONS = [{"keep": 0.25}, {"keep": 0.6}], matrix_options.OPTIONS      # what conftest.py makes
ALWAYS = {"quecc": {"weights": "pool"}}                     # the trained ones fit the bundled model alone
PROMPT, GRIDS, STEPS = [5, 6, I, 7, 8, 9], [[(2, 2)]], 4
NETWORKS = [(1, 1, 2), (2, 2, 3), (3, 4, 4)]                # seed, share, cross-attention layers
EXAMPLES = Path(__file__).parents[2] / "examples"


def by_hand(q: Tensor, kv: ImageKV, mask: Tensor | None) -> Tensor:
    """The attention of the last query position of sequence 0, in every head [H, n], as the layer has it."""
    H, G = q.shape[1], kv.key.shape[1]
    scores = torch.stack([kv.key[0, h // (H // G)] @ q[0, h, -1] for h in range(H)]) / math.sqrt(q.shape[-1])
    if mask is not None:
        mask = mask[0, :, -1].repeat_interleave(H // mask.shape[1], 0)                  # [H, n]
        scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def watched(network: LlamaVision, looker: Looker) -> tuple[list[list[tuple[Tensor, ImageKV]]], Run]:
    """Weights by hand and what they are about, in every layer for every token; and the run."""
    guide_like(network)                     # a copy is the guide of SGL; nobody watches that one
    layers = network.language_model.cross_layers
    seen = [[] for _ in layers]

    def watch(i: int):
        attention = layers[i].cross_attn

        def forward(q: Tensor, kv: ImageKV, mask: Tensor | None) -> Tensor:
            seen[i].append((by_hand(q, kv, mask), kv))
            return type(attention).forward(attention, q, kv, mask)
        return patch.object(attention, "forward", forward)

    image = encode(network, GRIDS, 4, looker)
    with ExitStack() as stack:
        for i in range(len(layers)):
            stack.enter_context(watch(i))
        return seen, forced(network, [PROMPT], image, looker, STEPS)


@pytest.fixture
def network(request) -> LlamaVision:
    """One of three, another one for every method and option."""
    return small_network(*NETWORKS[sum(map(ord, request.node.name)) % 3])


def test_the_weights_are_those_of_the_network_and_no_logit_changes(make, network):
    looker, pruner = Looker(make()), make()
    seen, run = watched(network, looker)
    plain = forced(network, [PROMPT], encode(network, GRIDS, 4, pruner), pruner, STEPS)
    assert torch.equal(plain.logits, run.logits) and plain.answer.kept == run.answer.kept
    looks = looker.looks(STEPS)
    assert len(looks) == STEPS == len(seen[0]) and looks.layers == len(seen) and looks.heads == 4
    for token in range(STEPS):
        for layer, steps in enumerate(seen):
            weights, kv = steps[token]
            look = looks.steps[token][layer]
            close(look.weights, weights)
            heads = weights.unflatten(0, (len(look.where), -1))                         # [K, H/K, n]
            for where, coords, own in zip(look.where, kv.coords[0], heads, strict=True):
                there = where >= 0
                assert torch.equal(looks.coords[where[there]], coords[there])
                assert looker.inner.name == "csp" or not own[:, ~there].any()
            mean = looks.attention(token, layer)
            close(mean, torch.stack([looks.attention(token, layer, head) for head in range(4)]).mean(0))
            total = mean.sum()
            assert total <= 1.0001 and (looker.inner.name == "csp" or total > 0.9999)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_the_bundled_model_gives_the_same_answer(assistant, method):
    """And of every token it is known where the model looked for it."""
    images = [open_image(EXAMPLES / "wide.png")]
    answers = []
    for around in (lambda pruner: pruner), Looker:
        pruner = around(load(method, keep=0.5))
        encoded = assistant.encode_images(images, pruner)
        answers.append(assistant.answer([messages("Describe the picture.", 1)], encoded, 12, pruner=pruner))
    assert answers[0].tokens == answers[1].tokens and answers[0].kept == answers[1].kept
    looks = pruner.looks(len(answers[0].tokens[0]))
    assert len(looks) == len(answers[0].tokens[0]) == 12 and looks.layers == 3
    assert 1 <= looks.of_word(range(12))[1].sum() <= len(looks.coords)
    assert all(abs(float(looks.attention(token).sum()) - 1) < 1e-4 for token in range(12)) or method == "csp"


def test_the_first_token_is_the_last_prompt_positions_and_the_token_that_ends_it_is_no_word(assistant):
    looker = Looker(Pruner())
    encoded = assistant.encode_images([open_image(EXAMPLES / "shapes.png")], looker)
    answer = assistant.answer([messages("What is written on the circle?", 1)], encoded, 12, pruner=looker)
    assert answer.texts == ["Y"] and len(looker.steps) == 2 and len(looker.looks(1)) == 1


# ----- on the image


def looks_of(*sets: tuple[list[float], list[int]], owners: list[Tensor] = ()) -> Looks:
    """One token, one layer, four encoded tokens, and K sets of weights and indices, one head each."""
    weights, where = (torch.tensor(part) for part in zip(*sets, strict=True))
    coords = torch.tensor([[0, 0, -1, -1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    return Looks(coords, [[Look(weights, where)]], list(owners))


def test_a_dropped_token_has_nothing_and_a_mean_counts_every_head():
    looks = looks_of(([0.75, 0.25], [3, 1]), ([0.5, 0.5], [0, 3]))
    close(looks.attention(0, 0, 0), torch.tensor([0, 0.25, 0, 0.75]))
    close(looks.attention(0), torch.tensor([0.25, 0.125, 0, 0.625]))
    assert looks.of_word([0])[1].tolist() == [0.5, 0.5, 0, 1]
    assert looks.of_word([0], 0, 1)[1].tolist() == [1, 0, 0, 1]


def test_what_a_merged_token_gets_is_that_of_all_that_it_stands_for():
    owner = torch.tensor([[0, 3, 3, 3]])
    merged = looks_of(([0.4, 0.6], [0, 3]), owners=[owner])
    close(merged.attention(0), torch.tensor([0.4, 0.2, 0.2, 0.2]))
    assert merged.of_word([0])[1].tolist() == [1, 1, 1, 1]
    before = looks_of(([0.4, 0.1, 0.2, 0.3], [0, 1, 2, 3]), owners=[owner])
    close(before.attention(0), torch.tensor([0.4, 0.1, 0.2, 0.3]))      # nothing was merged yet
    some = looks_of(([0.4, 0.1, 0.5], [0, 1, 3]), owners=[owner])
    close(some.attention(0), torch.tensor([0.4, 0.1, 0.25, 0.25]))


def test_masked_tokens_and_those_that_are_nowhere_are_not_placed():
    looks = looks_of(([0.5, 0.0, 0.5], [1, -1, -1]))
    close(looks.attention(0), torch.tensor([0, 0.5, 0, 0]))
    assert looks.of_word([0])[1].tolist() == [0, 1, 0, 0]


def test_tokens_are_found_by_where_they_are():
    encoded = torch.tensor(tile_coords(2, 2) + tile_coords(1, 2, 1))
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0))
    shuffled = encoded[order]
    assert torch.equal(shuffled[index_of(encoded[None], shuffled)[0]], encoded)
    strangers = torch.tensor([[0, 0, -2, -2], [0, 2, 0, 0], [-1, -1, -1, -1], [1, 1, 0, 0], [0, 1, -2, -2]])
    assert index_of(strangers[None], encoded).tolist() == [[-1] * 5]


def test_a_very_long_answer_is_recorded_in_part_and_nothing_recorded_is_an_error(monkeypatch):
    monkeypatch.setattr(looks_module, "MOST_BYTES", 1)
    looker = Looker(load("spatial"))
    with refused("ask about an image first"):
        looker.looks(1)
    network = small_network(*NETWORKS[0])
    forced(network, [PROMPT], encode(network, GRIDS, 4), looker, STEPS)
    assert len(looker.looks(STEPS)) == 1
    looker.encoded(ImageTokens(torch.ones(1, 2, 3), torch.tensor([tile_coords(1, 1)])), [[I]])
    assert len(looker.looks(STEPS)) == 0                # a new answer


# ----- words


@pytest.mark.parametrize("text", ["a red heart with K, a sign: 111", "don't", "  Y\n", "é🙂x", "..."])
def test_words_have_the_tokens_that_they_are_made_of(assistant, text):
    tokenizer = assistant.tokenizer
    ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    read, words = words_of(tokenizer, ids)
    assert read == tokenizer.decode(ids) == text
    assert [word.text for word in words] == looks_module.WORD.findall(text)
    for word in words:
        assert text[word.start:].startswith(word.text)
        own = tokenizer.decode(ids[i] for i in word.tokens)
        assert word.text in own and word.tokens == list(range(word.tokens[0], word.tokens[-1] + 1))
        for number in word.tokens[:1] + word.tokens[-1:]:       # none too many
            rest = tokenizer.decode(ids[i] for i in word.tokens if i != number)
            assert word.text not in rest


def test_an_answer_that_ends_within_a_character_and_special_tokens(assistant):
    tokenizer = assistant.tokenizer
    ids = tokenizer.tokenizer.encode("K 🙂", add_special_tokens=False).ids
    text, words = words_of(tokenizer, [tokenizer.stop_ids[0], *ids[:-1]])
    assert text == tokenizer.decode(ids[:-1]) and words[0].text == "K" and words[0].tokens == [1]
    assert words[-1].text == "\ufffd" and words[-1].tokens[-1] == len(ids) - 1
    assert words_of(tokenizer, []) == ("", [])
