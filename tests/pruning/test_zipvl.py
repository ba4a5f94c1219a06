"""ZipVL against the formulas of its paper (arXiv 2410.08584), in plain loops over captured queries and keys.

How many tokens hold a share of the attention, which ones are kept, which positions are asked, and how one tau
is found for a budget; what every method promises, that dropping is masking above all, is in test_pruners.py.
"""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import CROSS, SHARES, I, attention_of, close, kept_sets, random_image, refused, small_network
from loops import received_by_hand, watched
from reference import forced, masked
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, visible_images
from pruning.attention import attention_received
from pruning.methods.aircache import AirCache
from pruning.methods.zipvl import ZipVL, probes

PROMPT = [5, 6, I, 7, 8, 9]
SEEN = [[0, 0]] * 2 + [[0, 1]] * 4                  # the images that its positions see
strong_image = partial(random_image, scale=3)


def measured(q: Tensor, k: Tensor, seen: list[list[int]], images: list[int], sets: int
             ) -> list[tuple[list[float], list[float]]]:
    """Of each set: the mass of every token over all positions, and its mean over those that see it.

    q [H, T, d], k [G, N, d], the images that each position sees, and the image of each token.
    """
    sees = {t: [j for j, image in enumerate(images) if image in range(*own)] for t, own in enumerate(seen)}
    seeing = [sum(j in tokens for tokens in sees.values()) for j in range(len(images))]
    received = received_by_hand(q, k, sees, sets)
    return [(mass, [m / n for m, n in zip(mass, seeing, strict=True)]) for mass in received]


def fewest(mass: list[float], tau: float, least: int = 1) -> int:
    """The smallest p with the p highest at tau of the sum."""
    p, total = 0, 0.0
    for value in sorted(mass, reverse=True):
        if p >= least and total >= tau * sum(mass) - 1e-6:
            break
        p, total = p + 1, total + value
    return p


def ranked(mean: list[float], tokens: list[int], images: list[int], p: int) -> list[int]:
    """The p tokens with the highest mean, the best one of each image before all others."""
    order = sorted(tokens, key=lambda j: (-mean[j], j))
    best = {images[j]: j for j in reversed(order)}.values()
    return sorted(sorted(order, key=lambda j: j not in best)[:p])


@pytest.mark.parametrize("per", ["layer", "kv_head"])
@pytest.mark.parametrize("when", ["prefill", "boundary"])
@pytest.mark.parametrize("tau", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_the_formulas(seed, tau, when, per):
    """Each layer's own number, in prefill or after it; and the logits of the masked network."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), strong_image(14, seed=seed)
    pruner = ZipVL(tau=tau, when=when, per=per)
    run, q, k = watched(network, lambda: forced(network, [PROMPT], image, pruner, steps=3))
    expected, sets = [], 1 if per == "layer" else 4 // SHARES[seed]
    for queries, keys in zip(q, k, strict=True):
        stats = measured(queries[0], keys[0], SEEN, [0] * 14, sets)
        expected.append([ranked(mean, list(range(14)), [0] * 14, fewest(mass, tau)) for mass, mean in stats])
    everything = [[list(range(14))]] * CROSS[seed]
    assert [kept_sets(kv, image) for kv in run.read] == (expected if when == "prefill" else everything)
    assert all([kept_sets(kv, image) for kv in kvs] == expected for kvs in run.held)
    assert len({len(chosen) for layer in expected for chosen in layer}) > 1 or seed == 0
    close(run.logits, masked(network, run, [PROMPT], image))
    plain = forced(network, [PROMPT], image, steps=3)
    assert torch.equal(run.logits[:, 0], plain.logits[:, 0]) == (when == "boundary")


def choose(*weights: list[float], **options) -> list[int]:
    """What one layer keeps of an image, by the attention weights of each query position."""
    queries, image, kv = attention_of(torch.tensor([weights]))
    one = ZipVL(**options).layer(0, queries, image, kv)[1]
    return one.coords[0, 0, :, 3].tolist()


def test_how_many():
    weights = [[0.5, 0.3, 0.15, 0.05]] * 3
    for tau, n in (0.8, 2), (0.9, 3), (0.96, 4), (1.0, 4), (0.01, 1):
        assert choose(*weights, tau=tau) == list(range(n))
    assert choose([0.1] * 10) == list(range(10))
    assert choose([0.0, 0.0, 1.0, 0.0]) == [2]
    assert choose([0.6, 0.2, 0.2, 0.0], [0.0, 0.2, 0.2, 0.6], tau=0.5) == [0, 3]
    assert choose([0.25] * 4, tau=0.5) == [0, 1]                      # ties: the first
    sizes = [len(choose(*weights, tau=tau / 100)) for tau in range(1, 101)]
    assert sizes == sorted(sizes) and set(sizes) == {1, 2, 3, 4}


def attention_on(weights: list[list[float]], images: list[int]) -> tuple[Queries, ImageTokens, ImageKV]:
    """Positions with these weights on tokens of several images; each sees the images that it attends to."""
    queries, tokens, kv = attention_of(torch.tensor([weights]))
    attended = [{image for image, weight in zip(images, own, strict=True) if weight} for own in weights]
    seen = torch.tensor([[[min(own), max(own) + 1] for own in attended]])
    coords = torch.tensor([[[image, 0, 0, i] for i, image in enumerate(images)]])
    return replace(queries, seen=seen), replace(tokens, coords=coords), replace(kv, coords=coords[:, None])


def test_the_number_is_by_mass_and_the_choice_by_the_mean():
    """What one position attends to a lot is kept before what three attend to a little."""
    first, second = [0.4, 0.35, 0.25, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.4, 0.5, 0.1]
    queries, image, kv = attention_on([first, first, first, second], [0, 0, 0, 1, 1, 1])
    mass, mean = ZipVL(tau=0.5).score(queries, kv)[:, 0, 0]
    close(mass, torch.tensor([1.2, 1.05, 0.75, 0.4, 0.5, 0.1]))
    close(mean, torch.tensor([0.4, 0.35, 0.25, 0.4, 0.5, 0.1]))
    for tau, held in (0.5, [0, 4]), (0.7, [0, 3, 4]), (0.85, [0, 1, 3, 4]), (0.01, [0, 4]):
        kv_kept = ZipVL(tau=tau).layer(0, queries, image, kv)[1]
        assert kv_kept.coords[0, 0, :, 3].tolist() == held
        assert len(held) == max(2, fewest(mass.tolist(), tau))


@pytest.mark.parametrize("prompt", [[5, I, I, 6, 7, 8], [I, 5, 6, I, 7, 8, 9]], ids=["beside", "apart"])
@pytest.mark.parametrize("options", [{"tau": 0.5}, {"tau": 0.5, "when": "boundary"}, {"tau": 0.01}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_several_images(seed, options, prompt):
    """They compete; the best token of each goes first. At the boundary only what the last one sees counts."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), strong_image(9, 12, seed=seed)
    images, seen = [0] * 9 + [1] * 12, visible_images(torch.tensor([prompt]), I)[0].tolist()
    run, q, k = watched(network, lambda: forced(network, [prompt], image, ZipVL(**options)))
    late, last = "when" in options, range(*seen[-1])
    for queries, keys, read, held in zip(q, k, run.read, run.held[0], strict=True):
        (mass, mean), = measured(queries[0], keys[0], seen, images, 1)
        tokens = [j for j in range(21) if not late or images[j] in last]
        p = fewest([mass[j] for j in tokens], options["tau"], len({images[j] for j in tokens}))
        chosen = ranked(mean, tokens, images, p)
        assert kept_sets(read, image) == [list(range(21)) if late else chosen]
        assert kept_sets(held, image) == [[j for j in chosen if images[j] in last]]
    close(run.logits, masked(network, run, [prompt], image))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_holds_tau_of_the_attention(seed):
    """Of one image; so what a layer reads moves by no more than twice the rest, times the longest value."""
    generator = torch.Generator().manual_seed(seed)
    q, key, value = (torch.randn(1, *shape, 8, generator=generator) for shape in ((4, 5), (2, 30), (2, 30)))
    coords = torch.tensor([[[[0, 0, 0, i] for i in range(30)]]])
    queries, kv = Queries(q, torch.tensor([0, 1]).expand(1, 5, 2)), ImageKV(key, value, coords)
    mean = attention_received(queries, kv, per="layer")[0] / 5
    weights = (q[0] @ key[0].repeat_interleave(2, 0).transpose(-1, -2) / 8 ** 0.5).softmax(-1)
    for tau in 0.2, 0.5, 0.9, 0.975:
        held = ZipVL(tau=tau).layer(0, queries, ImageTokens(kv.value[0], coords[0]), kv)[1].coords[0, 0, :, 3]
        assert mean[held].sum() >= tau - 1e-6 > mean[held].sum() - mean[held].min() - 2e-6
        inside, values = torch.zeros(30).index_fill(0, held, 1), value[0].repeat_interleave(2, 0)
        share = (weights * inside).sum(-1, keepdim=True)
        moved = (weights @ values - (weights * inside / share) @ values).norm(dim=-1)
        assert (moved <= 2 * (1 - share[..., 0]) * values.norm(dim=-1).amax(1)[:, None] + 1e-6).all()


def test_one_position_alone_ranks_as_other_methods_do():
    """One position that sees one image: the mean that ZipVL chooses by, and the importance of AirCache."""
    network, image = small_network(1, 2, 3), strong_image(14)
    zipvl, aircache = ZipVL(0.5), AirCache(0.5)
    for pruner in zipvl, aircache:
        forced(network, [[5, 6, I]], image, pruner)
    for score, importance in zip(zipvl.scores, aircache.scores, strict=True):
        close(score[1, :, 0], importance)
        close(score[0], score[1])


# ----- a budget in the place of tau


def taus(masses: list[list[float]], target: int) -> tuple[float, float]:
    """Between which values of tau these layers keep `target` tokens in all, found by trying."""
    shares = {0.0, 1.0}
    for mass in masses:
        ordered = sorted(mass, reverse=True)
        shares |= {sum(ordered[:p]) / sum(mass) for p in range(len(mass))}
    ordered = sorted(shares)
    for low, high in zip(ordered, ordered[1:], strict=False):
        if sum(fewest(mass, (low + high) / 2) for mass in masses) == target:
            return low, high
    raise AssertionError(f"no tau keeps {target}")


@pytest.mark.parametrize("per", ["layer", "kv_head"])
@pytest.mark.parametrize("keep", [0.1, 0.35, 0.8, 3, 9])
@pytest.mark.parametrize("seed", range(3))
def test_one_tau_for_all_layers(seed, keep, per):
    """Exactly the budget, and what each layer keeps is what that tau asks for; cut at the boundary."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), strong_image(14, seed=seed)
    run, q, k = watched(network, lambda: forced(network, [PROMPT], image, ZipVL(keep, per=per)))
    sets = 1 if per == "layer" else 4 // SHARES[seed]
    stats = [measured(queries[0], keys[0], SEEN, [0] * 14, sets) for queries, keys in zip(q, k, strict=True)]
    total = CROSS[seed] * sets
    target = total * keep if isinstance(keep, int) else math.floor(keep * total * 14 + 0.5)
    low, high = taus([mass for layer in stats for mass, _ in layer], target)
    tau = (low + high) / 2
    expected = [[ranked(mean, list(range(14)), [0] * 14, fewest(mass, tau)) for mass, mean in layer]
                for layer in stats]
    assert [kept_sets(kv, image) for kv in run.held[0]] == expected
    assert sum(run.answer.kept[0]) * sets == pytest.approx(target)
    assert [kept_sets(kv, image) for kv in run.read] == [[list(range(14))]] * CROSS[seed]
    given = forced(network, [PROMPT], image, ZipVL(tau=tau, when="boundary", per=per))
    assert torch.equal(given.logits, run.logits)


def test_several_images_share_the_budget():
    """Each image adds its share, and each sequence of the batch has its own."""
    network, image = small_network(2, 4, 4), strong_image(9, 12)
    run = forced(network, [[I, I, 5, 6], [5, I, 6, I, 7]], image.expand(2), ZipVL(0.3))
    assert [sum(layers) for layers in run.answer.kept] == [11 + 14, 14]                   # 10.8, 14.4
    least = forced(network, [[I, I, 5, 6], [5, I, 6, I, 7]], image.expand(2), ZipVL(1))
    assert least.answer.kept[0] == [2.0] * 4 and sum(least.answer.kept[1]) == 4


def test_tokens_right_at_tau_go_to_the_first_layers():
    """All layers flat: nothing but their order tells them apart."""
    queries, image, kv = attention_of(torch.full((2, 3, 4), 0.25))
    pruner = ZipVL(0.45)
    for i in range(3):
        assert pruner.layer(i, queries, image, kv)[1] is kv
    held = [one.coords[0, 0, :, 3].tolist() for one in pruner.prefilled([kv] * 3)]
    assert sum(map(len, held)) == 5 and held == [[0, 1], [0, 1], [0]]               # 5.4


# ----- the positions that are asked


def test_probes():
    """All up to 128; of more, the last 64 and 64 others, the same for the same seed."""
    sees = torch.zeros(4, 400, dtype=torch.bool)
    sees[0, 20:320], sees[1, 50:178], sees[2, 100:400] = True, True, True
    asked = probes(sees, 3)
    assert asked.sum(1).tolist() == [128, 128, 128, 0] and (sees | ~asked).all()
    assert asked[0, 256:320].all() and asked[2, 336:].all() and torch.equal(asked[1], sees[1])
    assert torch.equal(asked[0, 20:320], asked[2, 100:400])                 # wherever they are
    assert torch.equal(asked, probes(sees, 3)) and not torch.equal(asked, probes(sees, 4))
    assert sees[0].sum() == 300


def test_only_probes_matter():
    """Of a long prompt: others may ask for anything."""
    n, generator = 300, torch.Generator().manual_seed(0)
    q, key = torch.randn(1, 4, n, 8, generator=generator), torch.randn(1, 2, 20, 8, generator=generator)
    coords = torch.tensor([[[[0, 0, 0, i] for i in range(20)]]])
    seen, kv = torch.tensor([0, 1]).expand(1, n, 2), ImageKV(key, key, coords)
    asked = probes(torch.ones(1, n, dtype=torch.bool), 0)
    mass, mean = ZipVL().score(Queries(q, seen), kv)
    close(mass[:, 0], attention_received(Queries(q[:, :, asked[0]], seen[:, :128]), kv, per="layer"))
    close(mean, mass / 128, 1e-7)
    assert mass.sum().item() == pytest.approx(128, abs=1e-3)
    strange = torch.where(asked[0][:, None], q, 1e3)
    assert torch.equal(ZipVL().score(Queries(strange, seen), kv)[0], mass)
    assert not torch.equal(ZipVL(seed=1).score(Queries(strange, seen), kv)[0], mass)


# ----- options


def test_keeping_all():
    """By tau as by keep; a budget, not tau, says so where both are given."""
    assert ZipVL(tau=1).keeps_all and ZipVL(tau=1.0).keeps_all and ZipVL(1.0).keeps_all
    assert not any(pruner.keeps_all for pruner in (ZipVL(), ZipVL(0.5, tau=1.0), ZipVL(3, tau=1.0)))
    network, image = small_network(1, 2, 3), strong_image(14)
    run = forced(network, [PROMPT], image, ZipVL(0.5, tau=1.0))
    assert sum(run.answer.kept[0]) == 21
    assert torch.equal(forced(network, [PROMPT], image, ZipVL(0.5)).logits, run.logits)
    nearly = forced(network, [PROMPT], replace(image, features=image.features / 3), ZipVL(tau=0.999999))
    assert nearly.answer.kept == [[14.0] * 3]


@pytest.mark.parametrize("options", [{"tau": 0}, {"tau": 1.01}, {"tau": -1.0}, {"tau": "most"}, {"tau": None},
                                   {"when": "step"}, {"per": "head"}, {"seed": 0.5}, {"keep": 0.0},
                                   {"keep": 0}, {"keep": 1.5}, {"keep": "all"}], ids=str)
def test_bad_options_get_one_line(options):
    with refused(f"zipvl: {min(options)} is"):
        ZipVL(**options)
