"""Merging by owners: means, weights, ln of the size, beside plain loops in float64; what is compared."""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import alone, batch_of, close, noise, random_image, refused
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens
from pruning import merge
from pruning.merge import joined, merge_kv, merge_tokens, owners

G, WIDTH = 2, 4                         # key/value heads, and their width


def ragged() -> ImageTokens:
    """Two images, none, one; padding holds NaN, which no result may show."""
    image = batch_of(random_image(7, 5, seed=1), None, random_image(9, seed=2))
    return replace(image, features=torch.where(image.mask[..., None], image.features, math.nan))


def keys_values(image: ImageTokens) -> ImageKV:
    shape = len(image.coords), G, image.coords.shape[1], WIDTH
    key, value = noise(*shape, seed=3), noise(*shape, seed=4)
    key, value = (torch.where(image.mask[:, None, :, None], t, math.nan) for t in (key, value))
    return ImageKV(key, value, image.coords[:, None], image.mask[:, None])


def some_owner(image: ImageTokens, sets: int = 1, seed: int = 0) -> Tensor:
    """Every third token stands for others of its image, at random: [B, sets, N]; nonsense at padding."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.full((len(image.coords), sets, image.coords.shape[1]), -7)
    for b, places in enumerate(image.coords[..., 0].tolist()):
        for g in range(sets):
            for i in {place for place in places if place >= 0}:
                own = torch.tensor([n for n, place in enumerate(places) if place == i])
                own = own[torch.randperm(len(own), generator=generator)]
                owner[b, g, own] = own[torch.arange(len(own)) % (len(own) // 3)]
    return owner


def merged_by_hand(x: Tensor, owner: Tensor, real: Tensor, weight: Tensor | None = None,
                   bias: Tensor | None = None) -> list[tuple[int, list[float], float]]:
    """Of one sequence and set, x [N, d]: each token that stays, its mean, ln of how many it stands for."""
    found = []
    for stays in range(len(x)):
        if not real[stays] or owner[stays] != stays:
            continue
        size, total, mean = 0.0, 0.0, [0.0] * x.shape[1]
        for j in range(len(x)):
            if real[j] and owner[j] == stays:
                count = 1.0 if bias is None else math.exp(bias[j])
                share = count * (1.0 if weight is None else float(weight[j]))
                size += count
                total += share
                mean = [m + share * float(v) for m, v in zip(mean, x[j], strict=True)]
        found.append((stays, [m / total for m in mean], math.log(size)))
    return found


def same(found: list, x: Tensor, coords: Tensor, bias: Tensor | None, mask: Tensor, before: Tensor):
    """What is left of one sequence and set is what the loops found: x [n, d], coords [n, 4] of `before`."""
    assert mask.tolist() == [True] * len(found) + [False] * (len(mask) - len(found))
    for n, (stays, mean, ln_size) in enumerate(found):
        close(x[n].double(), torch.tensor(mean, dtype=torch.float64))
        assert coords[n].tolist() == before[stays].tolist()
        assert bias is None or float(bias[n]) == pytest.approx(ln_size, abs=1e-5)


# ----- beside plain loops


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_tokens_become_weighted_means(weighted, biased):
    """Several images, text alone, NaN in padding: nothing of it is seen. Tokens that have a bias already
    count for as many as it says, and so do their sums."""
    image, owner = ragged(), some_owner(ragged())[:, 0]
    if biased:
        image.bias = torch.where(image.mask, noise(*image.mask.shape, seed=5), math.nan)
    weight = torch.where(image.mask, noise(*image.mask.shape, seed=6).exp(), math.nan) if weighted else None
    with patch.object(merge, "AT_ONCE", 5):
        small = merge_tokens(image, owner, weight)
    assert small.features.isfinite().all() and small.bias.dtype == torch.float32 and small.states is None
    assert small.features.shape[1] == small.bias.shape[1] == 3 and small.bias.isfinite().all()
    for b in range(3):
        found = merged_by_hand(image.features[b], owner[b], image.mask[b],
                               *(None if t is None else t[b] for t in (weight, image.bias)))
        same(found, small.features[b], small.coords[b], small.bias[b], small.mask[b], image.coords[b])


@pytest.mark.parametrize("sets", [1, G])
@pytest.mark.parametrize("weighted, biased", [(False, False), (True, False), (True, True)])
def test_keys_and_values_become_weighted_means(sets, weighted, biased):
    image = ragged()
    kv, owner = keys_values(image), some_owner(image, sets, seed=sets)
    if biased:
        kv.bias = torch.where(image.mask, noise(*image.mask.shape, seed=5), math.nan)[:, None]
    weight = noise(*image.mask.shape, seed=6).exp() if weighted else None
    small = merge_kv(kv, owner if sets == G else owner[:, 0], weight)
    assert small.key.isfinite().all() and small.value.isfinite().all()
    assert small.bias.shape == small.mask.shape == (3, sets, 3)
    for b in range(3):
        for g in range(G):
            k = g % sets
            for before, after in (kv.key, small.key), (kv.value, small.value):
                found = merged_by_hand(before[b, g], owner[b, k], image.mask[b],
                                       None if weight is None else weight[b],
                                       None if kv.bias is None else kv.bias[b, 0])
                same(found, after[b, g], small.coords[b, k], small.bias[b, k], small.mask[b, k],
                     image.coords[b])


def test_in_two_steps_as_in_one():
    """The bias is mass: means of means, each as heavy as it is, are the means of all."""
    image, first = random_image(12, seed=3), torch.tensor([[0, 0, 0, 3, 3, 5, 6, 6, 6, 6, 10, 5]])
    at_once = merge_tokens(image, torch.tensor([[0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 10, 5]]))
    twice = merge_tokens(merge_tokens(image, first), torch.tensor([[0, 0, 2, 2, 4]]))
    close(at_once.features, twice.features)
    close(at_once.bias, twice.bias)
    close(at_once.bias.exp(), torch.tensor([[5.0, 6.0, 1.0]]))
    assert torch.equal(at_once.coords, twice.coords)


def test_a_batch_gives_each_sequence_what_it_gets_alone():
    image, owner = ragged(), some_owner(ragged())[:, 0]
    small = merge_tokens(image, owner)
    for b in 0, 2:
        n = int(image.mask[b].sum())
        single = merge_tokens(alone(image, b), owner[b:b + 1, :n])
        real = small.mask[b]
        close(small.features[b, real], single.features[0])
        close(small.bias[b, real], single.bias[0])


def test_without_a_bias_each_token_keeps_its_own():
    image, owner = random_image(6), torch.tensor([[0, 0, 2, 2, 2, 5]])
    assert merge_tokens(image, owner, bias=False).bias is None
    image.bias = noise(1, 6)
    assert torch.equal(merge_tokens(image, owner, bias=False).bias, image.bias[:, [0, 2, 5]])
    key = noise(1, G, 6, WIDTH)
    kv = ImageKV(key, key, image.coords[:, None], None, image.bias[:, None])
    assert torch.equal(merge_kv(kv, owner, bias=False).bias, image.bias[:, None, [0, 2, 5]])


def test_nothing_to_merge_is_the_object_itself():
    image = ragged()
    kv, themselves = keys_values(image), torch.arange(12).expand(3, 12).clone()
    themselves[~image.mask] = 3                         # what it is at padding does not matter
    assert merge_tokens(image, themselves) is image and merge_kv(kv, themselves) is kv
    assert merge_kv(kv, themselves[:, None].expand(3, G, 12)) is kv
    themselves[2, 3] = 4                                # of one sequence; the others do not change a bit
    small = merge_tokens(image, themselves)
    assert torch.equal(small.features[0], image.features[0]) and torch.equal(small.bias[0], torch.zeros(12))


def test_half_precision_is_rounded_once():
    image, owner, weight = random_image(30, seed=7), (torch.arange(30) % 4)[None], noise(1, 30).exp()
    half = image.features.bfloat16()
    small, exact = (merge_tokens(replace(image, features=x), owner, weight) for x in (half, half.float()))
    assert small.features.dtype == torch.bfloat16 and small.bias.dtype == torch.float32
    assert torch.equal(small.features, exact.features.bfloat16())


def test_weights_may_be_small():
    image, owner = random_image(6), torch.tensor([[0, 0, 0, 3, 3, 3]])
    weight = noise(1, 6, seed=9).exp()
    tiny = merge_tokens(image, owner, weight * 1e-20)
    close(tiny.features, merge_tokens(image, owner, weight).features)
    close(tiny.bias.exp(), torch.tensor([[3.0, 3.0]]))


def test_bad_owners_are_refused():
    image = random_image(3, 3)
    with refused("keeps no token of image 1 in sequence 0"):
        merge_tokens(image, torch.tensor([[0, 1, 2, 0, 0, 0]]))
    with refused("merged into one that does not stay"):
        merge_tokens(image, torch.tensor([[0, 0, 1, 3, 3, 3]]))


# ----- what is compared


def test_keys_and_values_side_by_side():
    """Of the same norm in each head, whatever padding holds."""
    image = ragged()
    kv = keys_values(image)
    both = joined(kv)
    assert both.shape == (3, G, 12, 2 * WIDTH) and both.dtype == torch.float32
    for b in 0, 2:
        real = image.mask[b]
        for g in range(G):
            for part, x in (both[b, g, :, :WIDTH], kv.key), (both[b, g, :, WIDTH:], kv.value):
                norm = math.sqrt(sum(float(v) ** 2 for v in x[b, g, real].flatten()))
                close(part[real], x[b, g, real] / norm)
    assert (both[~image.mask[:, None].expand(-1, G, -1)] == 0).all()
    assert (joined(replace(kv, value=torch.zeros_like(kv.value), mask=None))[..., WIDTH:] == 0).all()


@pytest.mark.parametrize("sets", [0, G])
def test_clusters_are_asked_for_image_by_image(sets):
    """With the tokens, weights and tiles of one image in one set; what they answer is an index of a token."""
    image = ragged()
    x = image.features if not sets else keys_values(image).key
    weight, asked = noise(3, 12), []

    def cluster(own: Tensor, w: Tensor, tile: Tensor) -> Tensor:
        asked.append((own, w, tile.tolist()))
        return torch.full((len(own),), len(own) - 1)
    owner = owners(image, x, weight, cluster)
    assert owner.shape == x.shape[:-1]
    images = [(0, 0, 7), (0, 7, 12), (2, 0, 9)]         # sequence, first token, last + 1
    expected = [(i, first, last, b, g) for b in (0, 2) for i, (at, first, last) in enumerate(images)
                if at == b for g in range(max(sets, 1))]
    assert len(asked) == len(expected)
    for i, first, last, b, g in expected:
        part = x[b, g, first:last] if sets else x[b, first:last]
        assert sum(torch.equal(part, own) and torch.equal(weight[b, first:last], w) and
                   tile == [t // 5 for t in range(last - first)] for own, w, tile in asked) == 1, i
        assert set((owner[b, g] if sets else owner[b])[first:last].tolist()) == {last - 1}
    padding = (owner[:, 0] if sets else owner)[~image.mask]
    assert torch.equal(padding, torch.arange(12).expand(3, 12)[~image.mask])
