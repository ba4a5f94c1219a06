"""What docs/CORESET.md proves about attention over means, in float64: the bounds hold, the error is of the
second order in the size of the clusters, and without ln of their sizes it is not.

N tokens, d width; the keys and values of one head, and one query.
"""
import math

import pytest
import torch
from clusters_by_hand import Points
from helpers import I, noise, random_image, small_network
from reference import forced
from torch import Tensor

from model.image_tokens import ImageTokens
from pruning.clusters import ward
from pruning.methods.coreset import Coreset

SCALES = [2.0 ** -i for i in range(7)]


def loop_attention(q: list[float], keys: Points, values: Points, counts: list[float]) -> list[float]:
    """One head in plain loops; a token counts as often as `counts` says."""
    scores = [sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(len(q)) for key in keys]
    masses = [count * math.exp(score) for count, score in zip(counts, scores, strict=True)]
    return [sum(mass * value[c] for mass, value in zip(masses, values, strict=True)) / sum(masses)
            for c in range(len(values[0]))]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """q [d], k and v [N, d] -> [d]"""
    return (k @ q / len(q) ** 0.5 + bias).softmax(0) @ v


def means(x: Tensor, group: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of each cluster [C, d], and how many tokens it has [C]; `group` [N] is 0 ... C - 1."""
    one_hot = torch.nn.functional.one_hot(group).double()                               # [N, C]
    share = one_hot if weight is None else one_hot * weight[:, None]
    return (share / share.sum(0)).T @ x, one_hot.sum(0)


def over_means(q: Tensor, k: Tensor, v: Tensor, group: Tensor, weight: Tensor | None = None,
               bias: bool = True) -> Tensor:
    (k_mean, size), (v_mean, _) = means(k, group, weight), means(v, group, weight)
    return attention(q, k_mean, v_mean, size.log() if bias else 0.0)


def by_radius(q: Tensor, k: Tensor, v: Tensor, group: Tensor) -> float:
    """The first bound of the page: sinh(e) r_v + (cosh(e) - 1) R / 2."""
    k_mean, v_mean = means(k, group)[0], means(v, group)[0]
    e = float(q.norm() * (k - k_mean[group]).norm(dim=1).max()) / math.sqrt(len(q))
    r_v = float((v - v_mean[group]).norm(dim=1).max())
    R = float((v_mean - over_means(q, k, v, group)).norm(dim=1).max())
    return math.sinh(e) * r_v + (math.cosh(e) - 1) * R / 2


def by_squares(q: Tensor, k: Tensor, v: Tensor, group: Tensor) -> float:
    """The second one: g(e) |q| / sqrt(d) · sqrt(S_k S_v) + h(e) |q|² / d · S_k R."""
    (k_mean, _), (v_mean, _) = means(k, group), means(v, group)
    per = float(q.norm()) / math.sqrt(len(q))
    e = per * float((k - k_mean[group]).norm(dim=1).max())
    share = (k_mean[group] @ q / len(q) ** 0.5).softmax(0)                              # [N]
    s_k, s_v = (float(share @ (x - m[group]).square().sum(1)) for x, m in ((k, k_mean), (v, v_mean)))
    R = float((v_mean - over_means(q, k, v, group)).norm(dim=1).max())
    g, h = (math.exp(e) - 1) / e, (math.exp(e) - 1 - e) / e ** 2
    return g * per * math.sqrt(s_k * s_v) + h * per ** 2 * s_k * R


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A query, keys, values and clusters: of Ward's tree, or at random; wide and tight ones."""
    d, n, clusters, tight = (2, 8, 32)[seed % 3], 24, 1 + seed % 7, 0.5 ** (seed % 5)
    group = torch.arange(n) % clusters
    k, v = (noise(clusters, d, seed=seed + at).double()[group] + tight * noise(n, d, seed=seed - at).double()
            for at in (1000, 2000))
    if seed % 2:
        group = ward(torch.cat((k, v), 1)).cut(clusters).unique(return_inverse=True)[1]
    return noise(d, seed=seed + 4000).double() * (0.3, 1, 3)[seed // 3 % 3], k, v, group


def test_the_mean_stands_for_the_list_in_which_it_is_repeated():
    """And for the list of all tokens if those of a cluster are equal. In plain loops."""
    q, k, v, group = drawn(12)
    (k_mean, size), (v_mean, _) = means(k, group), means(v, group)
    ours = attention(q, k_mean, v_mean, size.log()).tolist()
    repeated = loop_attention(q.tolist(), k_mean[group].tolist(), v_mean[group].tolist(), [1.0] * len(group))
    counted = loop_attention(q.tolist(), k_mean.tolist(), v_mean.tolist(), size.tolist())
    assert len(size) == 6
    assert ours == pytest.approx(repeated, abs=1e-12) and ours == pytest.approx(counted, abs=1e-12)


@pytest.mark.parametrize("bound", [by_radius, by_squares])
def test_the_error_is_within_the_bound(bound):
    for seed in range(400):
        q, k, v, group = drawn(seed)
        error = float((attention(q, k, v) - over_means(q, k, v, group)).norm())
        assert 0 <= error <= bound(q, k, v, group)


def test_keys_that_are_not_the_means_add_little():
    """As where features are averaged, and keys are made of them: (exp(2 n) - 1) R / 2."""
    for seed in range(200):
        q, k, v, group = drawn(seed)
        (k_mean, size), (v_mean, _) = means(k, group), means(v, group)
        off = 0.5 ** (seed % 6) * noise(*k_mean.shape, seed=seed).double()
        n, means_only = float((off @ q).abs().max()) / math.sqrt(len(q)), over_means(q, k, v, group)
        R = float((v_mean - means_only).norm(dim=1).max())
        error = float((attention(q, k_mean + off, v_mean, size.log()) - means_only).norm())
        assert error <= (math.exp(2 * n) - 1) * R / 2 + 1e-12


@pytest.mark.parametrize("bound", [by_radius, by_squares])
def test_the_bound_can_be_reached(bound):
    """Nearly, by one cluster of two tokens: a smaller factor before its first term would be wrong."""
    q, k, group = torch.ones(1).double(), torch.tensor([[0.02], [-0.02]]).double(), torch.tensor([0, 0])
    error = float((attention(q, k, k) - over_means(q, k, k, group)).norm())
    assert 0.98 * bound(q, k, k, group) < error < bound(q, k, k, group)


def errors(seed: int, weight: Tensor | None = None, bias: bool = True) -> list[float]:
    """Clusters of 1 to 5 tokens around places that stay, tighter and tighter."""
    group = torch.tensor([0] * 5 + [1] * 4 + [2] * 3 + [3] * 2 + [4])
    places, apart = noise(2, 5, 8, seed=seed).double(), noise(2, 15, 8, seed=seed + 100).double()
    q, found = noise(8, seed=seed + 200).double(), []
    for scale in SCALES:
        k, v = places[:, group] + scale * apart
        found.append(float((attention(q, k, v) - over_means(q, k, v, group, weight, bias)).norm()))
    return found


def order(found: list[float]) -> float:
    """How the error falls: with the power of the scale, over the last halvings."""
    return math.log2(found[-4] / found[-1]) / 3


def test_the_error_is_of_second_order():
    orders = [order(errors(seed)) for seed in range(20)]
    assert min(orders) > 1.8 and sum(orders) / 20 > 1.95


def test_weighted_means_leave_an_error_of_first_order():
    weight = noise(15, seed=1).double().exp()
    orders = [order(errors(seed, weight)) for seed in range(20)]
    assert 0.8 < sum(orders) / 20 < 1.2


def test_without_the_sizes_the_error_stays():
    """However tight the clusters are, as they are of several sizes."""
    for seed in range(20):
        without, with_sizes = errors(seed, bias=False), errors(seed)
        assert order(without) < 0.2 and without[-1] > 20 * with_sizes[-1]


def test_the_answers_of_a_network_have_an_error_of_second_order():
    """In prefill and in decoding, through its norms of keys and all its layers; the clusters are found."""
    network, prompt, image = small_network(1, 2, 3), [[5, I, 7, 8, 9]], random_image(9)
    group, places, found = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3]), noise(4, 32, seed=3), []
    for scale in 0.4, 0.2, 0.1, 0.05:
        tokens = ImageTokens(places[group] + scale * noise(1, 9, 32, seed=4), image.coords)
        full = forced(network, prompt, tokens, steps=3).logits
        ours = forced(network, prompt, tokens, Coreset(4, question=0.0), steps=3)
        assert ours.answer.kept == [[4, 4, 4]]
        found.append((full - ours.logits).norm(dim=-1)[0])                              # [steps]
    slopes = (found[0] / found[-1]).log2() / 3
    assert (slopes > 1.8).all() and (found[0] > 0.01).all()
