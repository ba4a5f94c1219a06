"""The maps of the See tab: the right patch is the brightest and has the frame; the small ones show what is
kept."""
from pathlib import Path

import pytest
import torch
from map_helpers import PROCESSOR, SIZES, P, S, kv, noisy_image, patches, pixels, tokens
from PIL import Image

from generate import Assistant
from model.image_tokens import ImageTokens
from page.looks import Look, Looker, Looks, words_of
from page.maps import MARK, SMALL, heat_map, heat_words, kept_panel, smaller
from pruning import METHODS, Pruner, load, view
from weights.image_file import open_image
from weights.tokenizer import messages

EXAMPLES = Path(__file__).parents[2] / "examples"


def looker_of(grid: tuple[int, int], *layers) -> Looker:
    """One that has seen an image of this grid, and what every layer keeps of it."""
    looker, coords = Looker(Pruner()), tokens(grid)[None]
    looker.encoded(ImageTokens(torch.ones(1, coords.shape[1], 8), coords), [[0]])
    looker.prefilled(list(layers))
    return looker


def looks_at(grid: tuple[int, int], *weights: torch.Tensor, there: torch.Tensor | None = None) -> Looks:
    """A token for each of the weights [N], of one layer with one head."""
    coords = tokens(grid)
    where = torch.arange(len(coords))
    where = where if there is None else torch.where(there, where, -1)
    return Looks(coords, [[Look(each[None], where[None])] for each in weights], [])


@pytest.mark.parametrize("grid", SIZES)
def test_the_framed_patch_has_most_attention_and_the_colours_go_by_it(grid):
    coords = tokens(grid)
    grey = Image.new("RGB", (grid[1] * S, grid[0] * S), "grey")
    weights = torch.rand(len(coords), generator=torch.Generator().manual_seed(1))
    weights[0] = 2                                      # a class token: it is nowhere on the map
    weights = weights / weights.sum()
    panel = heat_map(grey, PROCESSOR, looker_of(grid), looks_at(grid, weights), [0])
    best = weights.masked_fill(coords[:, 2] < 0, -1).argmax()
    tile, row, column = coords[best, 1:].tolist()
    side = panel.width // (grid[1] * P)
    y, x = ((tile // grid[1]) * P + row) * side, ((tile % grid[1]) * P + column) * side
    framed = (pixels(panel) == torch.tensor(MARK)).all(-1).nonzero()
    assert framed.amin(0).tolist() == [y, x] and framed.amax(0).tolist() == [y + side - 1, x + side - 1]
    light = patches(pixels(panel), grid).flatten(2).mean(-1)                            # [rows, columns]
    wanted = torch.zeros_like(light)
    for weight, (_, tile, row, column) in zip(weights, coords.tolist(), strict=True):
        if row >= 0:
            wanted[tile // grid[1] * P + row, tile % grid[1] * P + column] = weight
    assert light.argmax() == wanted.argmax()
    assert torch.corrcoef(torch.stack((light.flatten(), wanted.flatten().sqrt())))[0, 1] > 0.95


def test_what_could_not_be_looked_at_has_no_colour():
    coords = tokens((1, 1))
    there = torch.arange(len(coords)) % 2 == 0
    weights = torch.where(there, 1.0, 0.0)
    panel = heat_map(Image.new("RGB", (32, 32), "grey"), PROCESSOR, looker_of((1, 1)),
                     looks_at((1, 1), weights / weights.sum(), there=there), [0])
    light = patches(pixels(panel), (1, 1)).flatten(3).mean(-1)                          # [4, 4, 3]
    for i, (_, _, row, column) in enumerate(coords.tolist()):
        if row >= 0:
            red, _, blue = light[row, column]
            assert (red > blue + 5) == bool(there[i])


def test_a_word_of_two_tokens_is_their_mean_and_the_rest_is_said():
    coords = tokens((1, 1))
    first, second = torch.zeros(len(coords)), torch.zeros(len(coords))
    first[0], first[1], second[2] = 0.5, 0.5, 0.75      # a class token, two patches, and nowhere
    looks = looks_at((1, 1), first, second)
    assert heat_words(looks, [0, 1]) == (
        "37.5% of the attention is on the framed patch, 62.5% on all patches, 25.0% on class tokens, "
        "12.5% on a token that the method added")
    assert heat_words(looks, [0]).endswith("50.0% on all patches, 50.0% on class tokens")
    only = looks_at((1, 1), torch.eye(len(coords))[0])  # all of it on the class token
    assert heat_map(noisy_image(32, 20), PROCESSOR, looker_of((1, 1)), only, [0]).size == (576, 576)


def test_a_small_panel_shows_the_share_of_layers_that_keep_a_patch():
    image, both, one = noisy_image(32, 32), (0, 0, 1, 1), (0, 0, 2, 2)
    panel = kept_panel(image, PROCESSOR, looker_of((1, 1), kv([both, one]), kv([both])))
    assert panel.size == (SMALL, SMALL)
    bright = patches(pixels(panel), (1, 1)).flatten(2).mean(-1)
    full = patches(pixels(smaller(image.resize((576, 576), 0), SMALL)), (1, 1)).flatten(2).mean(-1)
    dark = sum(view.DARK) / 3
    for where, dim in ((1, 1), 0), ((2, 2), view.DIM / 2), ((3, 3), view.DIM):
        assert abs(bright[where] - (full[where] * (1 - dim) + dark * dim)) < 4
    assert smaller(Image.new("RGB", (400, 2)), 100).size == (100, 1)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_drawn(assistant, method):
    image = open_image(EXAMPLES / "wide.png")
    looker = Looker(load(method, keep=0.3))
    encoded = assistant.encode_images([image], looker)
    answer = assistant.answer([messages("What does the sign say?", 1)], encoded, 8, pruner=looker)
    _, words = words_of(assistant.tokenizer, answer.tokens[0])
    looks = looker.looks(len(answer.tokens[0]))
    drawn = {heat_map(image, assistant.processor, looker, looks, words[0].tokens, *of).tobytes()
             for of in ((None, None), (0, None), (2, 3), (None, 1))}
    assert len(drawn) == 4
    panel = kept_panel(image, assistant.processor, looker)
    assert max(panel.size) == SMALL and len(panel.getcolors(panel.width * panel.height)) > 20
