"""Maps of clusters: patches in the mean colour of their cluster, outlines where two meet, every count."""
import itertools
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from helpers import I, batch_of, random_image, small_network
from map_helpers import PROCESSOR, SIZES, P, kv, noisy_image, pixels, recorded, tokens
from PIL import Image
from torch import Tensor

from generate import Assistant, generate
from model.image_tokens import Grid, ImageTokens
from pruning import Pruner, load
from pruning.recorder import Recorder
from pruning.view import BORDER, DARK, OUTLINE, coords_of
from pruning.visualize import kept_map
from weights.image_file import open_image
from weights.tokenizer import messages

LIGHT = torch.tensor(OUTLINE)


def merging(grids: list[Grid], owners: list[Tensor], layers: int = 3,
            seen: tuple[int, ...] = (0,)) -> Recorder:
    """A recorder of images of these grids whose tokens were merged; the prompt sees some of the images."""
    coords = tokens(*grids)
    held = coords[torch.isin(coords[:, 0], torch.tensor(seen))].tolist()
    recorder = recorded(grids)
    recorder.inner.owners = owners
    recorder.prefilled([kv(held)] * layers)
    return recorder


def random_owners(n: int, clusters: int, seed: int = 0) -> Tensor:
    """Each token with a random one of `clusters` tokens, which own themselves: [1, n]."""
    generator = torch.Generator().manual_seed(seed)
    stay = torch.randperm(n, generator=generator)[:clusters]
    owner = stay[torch.randint(clusters, (n,), generator=generator)]
    owner[stay] = stay
    return owner[None]


def at_patch(grid: Grid, coords: Tensor) -> dict[tuple[int, int], int]:
    """The index of the token of each patch, by its row and column in the image."""
    return {(tile // grid[1] * P + row, tile % grid[1] * P + column): i
            for i, (_, tile, row, column) in enumerate(coords.tolist()) if row >= 0}


def mean_colours(image: Image.Image, grid: Grid, owner: list[int]) -> dict[int, Tensor]:
    """The mean of the pixels of all patches of each owner, one patch after the other."""
    canvas = PROCESSOR._draw(image, grid).float()
    side = canvas.shape[0] // (grid[0] * P)
    found = {}
    for (row, column), token in at_patch(grid, tokens(grid)).items():
        patch = canvas[row * side:(row + 1) * side, column * side:(column + 1) * side]
        found.setdefault(owner[token], []).append(patch.flatten(0, 1))
    return {each: torch.cat(parts).mean(0) for each, parts in found.items()}


def square(panel: Tensor, grid: Grid, row: int, column: int) -> Tensor:
    """The pixels of one patch of a panel, [side, side, 3]."""
    side = len(panel) // (grid[0] * P)
    return panel[row * side:(row + 1) * side, column * side:(column + 1) * side]


# ----- pixels


@pytest.mark.parametrize("grid", SIZES)
def test_every_patch_has_the_mean_colour_of_its_cluster(drawn, grid):
    """Beside an outline, of up to 4 pixels at each side, and the dot in the middle."""
    image, coords = noisy_image(*SIZES[grid]), tokens(grid)
    owners = random_owners(len(coords), 5)
    kept_map([image], PROCESSOR, merging([grid], [owners]), "")
    panel, owner = pixels(drawn[1][0]), owners[0].tolist()
    colours = mean_colours(image, grid, owner)
    assert len(colours) == 5 and panel.shape[:2] == pixels(drawn[0][0]).shape[:2]
    for (row, column), token in at_patch(grid, coords).items():
        inner = square(panel, grid, row, column)[4:-4, 4:-4]
        corner = inner[:len(inner) // 4, :len(inner) // 4].flatten(0, 1)
        assert len(corner) and (corner - colours[owner[token]]).abs().max() <= 0.51


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_outlines_are_where_two_clusters_meet_and_nowhere_else(drawn, grid):
    image, coords = noisy_image(*SIZES[grid]), tokens(grid)
    owner = random_owners(len(coords), 3, seed=1)
    kept_map([image], PROCESSOR, merging([grid], [owner]), "")
    panel, where = pixels(drawn[1][0]), at_patch(grid, coords)
    met = set()
    side = len(panel) // (grid[0] * P)
    for seen, turned in (panel, False), (panel.transpose(0, 1), True):
        for (row, column), token in where.items():
            across, along = (column, row) if turned else (row, column)
            below = where.get((row, column + 1) if turned else (row + 1, column))
            if below is None:
                continue
            end, middle = (across + 1) * side, along * side + side // 3
            tile_ends = (across + 1) % P == 0
            near = seen[end - 1:end + 1, middle]                # on both sides of where the patches meet
            if tile_ends:
                assert (near == torch.tensor(BORDER)).all()
                near = seen[[end - 2, end + 1], middle]
            different = bool(owner[0, token] != owner[0, below])
            assert ((near == LIGHT).all(-1) == different).all()
            met.add((tile_ends, different))
    assert met == set(itertools.product({False, grid != (1, 1)}, {False, True}))


def test_a_dot_marks_the_token_of_a_cluster_of_several(drawn):
    coords = tokens((1, 1))
    owner = torch.arange(len(coords))
    owner[[1, 2, 3]] = 2                                        # of three patches
    owner[[0, 9]] = 0                                           # of the class token and a patch
    owner[[12, 16]] = 16                                        # of two regions
    kept_map([noisy_image(32, 32)], PROCESSOR, merging([(1, 1)], [owner[None]]), "")
    panel, dotted = pixels(drawn[1][0]), []
    for (row, column), token in at_patch((1, 1), coords).items():
        patch = square(panel, (1, 1), row, column)
        if (patch[len(patch) // 2, len(patch) // 2] == LIGHT).all():
            dotted.append(token)
    assert dotted == [2, 16]


def test_bright_clusters_have_dark_outlines(drawn):
    image = Image.new("RGB", (32, 32), (240, 240, 240))
    image.paste((20, 20, 20), (0, 16, 32, 32))
    kept_map([image], PROCESSOR, merging([(1, 1)], [torch.arange(17)[None]]), "")
    panel = pixels(drawn[1][0])
    side = len(panel) // P
    assert (panel[2 * side - 1, 9] == torch.tensor(DARK)).all() and (panel[2 * side, 9] == LIGHT).all()
    assert (panel[9, side - 1:side + 1] == torch.tensor(DARK)).all() and (panel[-9, side] == LIGHT).all()


# ----- panels and words


def test_the_image_stands_beside_its_clusters_and_all_is_counted(drawn):
    image, grid = noisy_image(64, 50), (2, 2)
    owner = random_owners(68, 7)
    kept_map([image], PROCESSOR, merging([grid], [owner]), "a title")
    largest = max(owner[0].tolist().count(token) for token in set(owner[0].tolist()))
    assert [label for _, label in drawn[:-1]] == [
        "as the model saw it\n68 tokens", f"all 3 layers: 7 clusters\ntokens in the largest: {largest}"]
    plain = pixels(drawn[0][0])
    canvas = PROCESSOR._draw(image, grid).float()
    factor = len(plain) // len(canvas)
    canvas = canvas.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    differs = (plain != canvas).any(-1)
    middle = len(plain) // 2
    assert not differs[:middle - 1, :middle - 1].any() and differs[middle].all()        # but for the border
    assert drawn[-1][:2] == ["a title", "68 real image tokens -> 7 clusters (10.3%)"]
    assert any(line.startswith("dot: ") for line in drawn[-1])


def test_layers_that_share_their_clusters_share_a_panel(drawn):
    all_apart, merged = torch.arange(17)[None], random_owners(17, 4)
    recorder = merging([(1, 1)], [all_apart, merged, merged.clone()])
    kept_map([noisy_image(32, 32)], PROCESSOR, recorder, "")
    assert [label.split("\n")[0] for _, label in drawn[1:-1]] == ["layer 0: 17 clusters",
                                                                  "layers 1, 2: 4 clusters"]
    assert f"17 real image tokens -> 8.3 clusters ({25 / 51:.1%}, mean over layers)" in drawn[-1]
    single = merging([(1, 1)], [merged])
    drawn.clear()
    kept_map([noisy_image(32, 32)], PROCESSOR, merging([(1, 1)], [merged] * 3), "")
    equal = drawn[1]
    drawn.clear()
    kept_map([noisy_image(32, 32)], PROCESSOR, single, "")
    assert equal[1] == drawn[1][1] and equal[0].tobytes() == drawn[1][0].tobytes()
    with pytest.raises(ValueError, match="owners of 2 layers"):
        kept_map([noisy_image(32, 32)], PROCESSOR, merging([(1, 1)], [merged] * 2), "")


def test_of_several_heads_the_first_is_drawn_and_named(drawn):
    heads = [random_owners(17, clusters, seed=clusters) for clusters in (4, 6)]
    kept_map([noisy_image(32, 32)], PROCESSOR, merging([(1, 1)], [torch.stack(heads, 1)]), "")
    panel, label = drawn[1]
    assert label.startswith("all 3 layers, KV head 0 of 2: 4 clusters\n")
    assert "17 real image tokens -> 5 clusters (29.4%)" in drawn[-1]
    drawn.clear()
    kept_map([noisy_image(32, 32)], PROCESSOR, merging([(1, 1)], heads[:1]), "")
    assert panel.tobytes() == drawn[1][0].tobytes()


def test_only_images_in_sight_are_drawn_each_with_its_own_clusters(drawn):
    images, grids = [noisy_image(32, 20), noisy_image(20, 64), noisy_image(96, 20)], [(1, 1), (1, 2), (3, 1)]
    parts = [random_owners(n, clusters) for n, clusters in ((17, 3), (34, 5), (51, 8))]
    owner = torch.cat((parts[0], parts[1] + 17, parts[2] + 51), 1)
    kept_map(images, PROCESSOR, merging(grids, [owner], seen=(1, 2)), "")
    labels = [label.split("\n")[0] for _, label in drawn[:-1]]
    assert labels == ["image 2, as the model saw it", "image 2, all 3 layers: 5 clusters",
                      "image 3, as the model saw it", "image 3, all 3 layers: 8 clusters"]
    assert "85 real image tokens -> 13 clusters (15.3%)" in drawn[-1]
    assert "out of sight, not drawn: image 1" in drawn[-1]
    for image, grid, part, (panel, _) in zip(images[1:], grids[1:], parts[1:], drawn[1:-1:2], strict=True):
        colours, panel = mean_colours(image, grid, part[0].tolist()), pixels(panel)
        for (row, column), token in at_patch(grid, tokens(grid)).items():
            assert (square(panel, grid, row, column)[5, 5] - colours[int(part[0, token])]).abs().max() < 0.51


# ----- what the recorder remembers


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_the_owners_of_sequence_0_are_indices_without_its_padding(heads):
    """Padding stands in the middle, and its owners may be anything."""
    coords, mask = tokens((1, 1), (1, 2)), torch.ones(2, 51, dtype=torch.bool)
    padding = [0, 5, 6, 30, 50]
    mask[0, padding] = False
    real = [i for i in range(51) if i not in padding]
    owner = torch.tensor(real)[torch.arange(51) * 7 % len(real)]
    owner[padding] = -999
    owners = torch.stack((owner, torch.zeros_like(owner)))                              # [2, N]
    if heads:
        owners = torch.stack([owners] + [owners.flip(0)] * (heads - 1), 1)              # [2, K, N]
    recorder = Recorder(Pruner())
    recorder.inner.owners = [owners]
    recorder.encoded(ImageTokens(torch.ones(2, 51, 8), coords.expand(2, -1, -1), mask), [[0], [0]])
    assert recorder.clusters == []
    recorder.prefilled([])
    found = recorder.clusters[0]
    assert found.shape == (max(heads, 1), len(real))
    assert [real[i] for i in found[0].tolist()] == [int(owner[i]) for i in real]


CORESETS = {"blind": {"question": 0.0}, "asked": {}, "first layer whole": {"full_layers": 1},
            "first cache whole": {"full_layers": 1, "early_caches": "full"}, "boundary": {"when": "boundary"},
            "each layer and head": {"when": "boundary", "space": "keys_values"}}


@pytest.mark.parametrize("options", CORESETS.values(), ids=CORESETS)
def test_the_owners_of_coreset_are_the_tokens_that_its_layers_hold(options):
    """In every layer and head, for a sequence with padding and one without."""
    network, prompts = small_network(1, 2, 3), [[5, 6, I, 7, 8, 9], [5, I, I, 6, 7]]
    image = batch_of(random_image(11), random_image(9, 10, seed=1))
    for order in [0, 1], [1, 0]:
        recorder = Recorder(load("coreset", keep=0.3, **options))
        generate(network, [prompts[b] for b in order], image.select(order), 2, (), pruner=recorder)
        coords = coords_of(recorder.image)[0]
        assert len(recorder.clusters) == len(recorder.image_kv) == 3
        for owners, held in zip(recorder.clusters, recorder.image_kv, strict=True):
            sets = coords_of(held)
            assert owners.shape == (len(sets), len(coords))
            for owner, there in zip(owners, sets, strict=True):
                assert torch.equal(coords[owner.unique()], there)
                assert torch.equal(owner[owner], owner) and len(there) <= len(coords)


class Squares(Pruner):
    """Keeps the top left patch of every 2 x 2, which stands for them, and the class tokens."""
    merges: ClassVar[bool] = True

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        first = image.coords.clone()
        first[..., 2:] -= first[..., 2:].clamp(min=0) % 2
        same = (first[:, :, None] == image.coords[:, None]).all(-1)                     # [B, N, N]
        self.owners = [same.int().argmax(-1)]
        return image.take(self.owners[0] == torch.arange(image.coords.shape[1]))


def test_a_method_that_says_what_it_merged_is_drawn_and_others_are_as_they_were(drawn):
    assistant = Assistant("tiny", device="cpu")
    images = [open_image(Path(__file__).parents[2] / "examples" / "tall.png")]

    def draw(pruner: Pruner) -> Recorder:
        drawn.clear()
        recorder = Recorder(pruner)
        encoded = assistant.encode_images(images, recorder)
        assistant.answer([messages("Where is the star?", 1)] * 2, encoded, 3, pruner=recorder)
        kept_map(images, assistant.processor, recorder, "")
        return recorder

    draw(Squares(keep=0.5))
    labels = ["as the model saw it\n150 tokens", "all 3 layers: 51 clusters\ntokens in the largest: 4"]
    assert [label for _, label in drawn[:-1]] == labels
    recorder = draw(load("elastic_cache", keep=0.1))
    assert recorder.clusters == [] and len(drawn) == 4 and drawn[0][1].startswith("layer 0: 15 kept\n")
    assert "bright and outlined: kept; dark: merged into kept tokens" in drawn[-1]
