"""CSP against its formulas (arXiv 2412.04652 and its code), in loops over captured queries and keys.

The softmax with n in its denominator, which rows ask, a set for each key/value head; then the same on the
text's own caches. What every method promises, that dropping is masking above all, is in test_pruners.py.
"""
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.cache import TextKV
from model.decoder import SelfAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.layers import attend, rotary_angles, rotary_frequencies
from pruning.methods.csp import CSP, nsoftmax
from pruning.methods.elastic_cache import ElasticCache
from pruning.methods.fastv import FastV
from pruning.pruner import Prompts

I = 60          # noqa: E741  the image token
PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)]]


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ----- the formulas, slowly


def weights(q: Tensor, k: Tensor, n: float) -> list[float]:
    """One row, q [d] and k [N, d]."""
    powers = [math.exp(float(q.double() @ key.double()) / math.sqrt(len(q))) for key in k]
    return [power / (n + sum(powers)) for power in powers]


def scores(q: Tensor, k: Tensor, sees: dict[int, list[int]], n: float, sets: int) -> list[Tensor]:
    """Of each set [N]: summed over rows, a mean over its query heads; q [H, T, d], k [G, N, d], and what each
    row sees."""
    H, N = len(q), k.shape[1]
    total = [torch.zeros(N, dtype=torch.float64) for _ in range(sets)]
    for h in range(H):
        for t, inside in sees.items():
            for j, weight in zip(inside, weights(q[h, t], k[h * len(k) // H, inside], n), strict=True):
                total[h * sets // H][j] += weight / (H // sets)
    return total


def best(score: Tensor, n: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda j: (-float(score[j]), j))[:n])


def half_up(share: float | int, n: int) -> int:
    return min(share, n) if type(share) is int else max(1, math.floor(share * n + 0.5 + 1e-9))


def held_by(kv: ImageKV, image: ImageTokens, row: int = 0) -> list[list[int]]:
    """Which tokens of a batch row each set of a cache holds, as their numbers."""
    order = {tuple(coords): i for i, coords in enumerate(image.coords[row].tolist())}
    masks = torch.ones(kv.coords.shape[1:3], dtype=torch.bool) if kv.mask is None else kv.mask[row]
    return [[order[tuple(p)] for p in coords_of[mask.expand(len(coords_of))].tolist()]
            for coords_of, mask in zip(kv.coords[row], masks, strict=True)]


def told(pruner: CSP, image: ImageTokens, lengths: list[int]) -> CSP:
    pruner.encoded(image, Prompts([[5] * n for n in lengths], 10, ()))
    return pruner


def chosen(logits: Tensor, kv_heads: int = 1, **options) -> list[list[int]]:
    """What is kept of one image that is looked at with these scores [H, T, N], before the softmax."""
    heads, rows, N = logits.shape
    coords = torch.tensor([[[0, 0, 0, i] for i in range(N)]])
    image, key = ImageTokens(coords.float(), coords), torch.eye(N).expand(1, kv_heads, N, N)
    queries = Queries((logits * N ** 0.5)[None], torch.tensor([0, 1]).expand(1, rows, 2))
    pruner, kv = told(CSP(**options), image, [rows]), ImageKV(key, key, coords[:, None])
    assert pruner.layer(0, queries, image, kv) == (image, kv)           # it is read with everything
    return held_by(pruner.prefilled([kv])[0], image)


# ----- n in the softmax


def test_the_softmax_has_a_key_more():
    o = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in 0.25, 1.0, 7.0:
        ours, Z = nsoftmax(o, n), o.exp().sum(-1)
        close(ours, o.exp() / (n + Z)[..., None], atol=1e-12)
        close(ours.sum(-1), Z / (n + Z), atol=1e-12)
    assert torch.equal(nsoftmax(o, 0.0), o.softmax(-1))
    close(nsoftmax(torch.zeros(2), 1.0), torch.tensor([1 / 3, 1 / 3]))
    assert nsoftmax(torch.tensor([1e4, -1e4]), 1.0).tolist() == [1, 0]
    assert nsoftmax(torch.tensor([-1e4, -1e4]), 1.0).tolist() == [0, 0]


def test_n_lets_weak_rows_count_less():
    looked = torch.tensor([[[-4.0, -5.0], [2.0, 2.2]]])
    for n, sums, winner in (0.0, [1.181, 0.819], 0), (1.0, [0.442, 0.525], 1):
        close(nsoftmax(looked[0], n).sum(0), torch.tensor(sums), atol=1e-3)
        assert chosen(looked, keep=1, n=n, obs_rows=2) == [[winner]]
    for row in looked[0]:
        assert len({tuple(chosen(row.view(1, 1, 2), keep=1, n=n)[0]) for n in (0.0, 0.1, 1.0, 50.0)}) == 1


# ----- the choice


def test_heads_choose_for_themselves_or_together():
    looked = torch.zeros(4, 1, 6)
    for head, favourite in enumerate([1, 1, 4, 5]):         # the third and the fourth share a key/value head
        looked[head, 0, favourite] = 3 + 0.1 * head
        looked[head, 0, 2] = 2.9
    assert chosen(looked, 2, keep=2) == [[1, 2], [2, 5]]
    assert chosen(looked, 2, keep=2, heads="layer") == [[1, 2]]
    assert chosen(looked, 4, keep=1) == [[1], [1], [4], [5]]
    assert chosen(torch.zeros(2, 3, 5), keep=0.5) == [[0, 1, 2]]                # ties; 2.5: half up


def test_only_the_last_rows_are_asked():
    """A number of them, or a share of text and image together: 4 rows and 6 tokens."""
    looked = torch.zeros(1, 4, 6)
    for row, favourite in enumerate([5, 3, 3, 0]):
        looked[0, row, favourite] = 3
    looked[0, 0, 5] = 30
    for asked, kept in (1, 0), (0.1, 0), (2, 0), (0.2, 0), (3, 3), (0.3, 3), (0.7, 3), (1.0, 3):
        assert chosen(looked, keep=1, obs_rows=asked) == [[kept]]
    assert chosen(looked, keep=2, obs_rows=4) == [[3, 5]] == chosen(looked, keep=2, obs_rows=99)


@pytest.mark.parametrize("options", [{}, {"obs_rows": 2, "heads": "layer"}, {"n": 0, "keep": 0.5},
                                   {"obs_rows": 1.0, "n": 9.0, "keep": 3}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_definition(seed, options, small, see, ask, masked):
    """The sets that plain loops choose, in every layer, and the logits of the masked network."""
    network, row = small(seed, (1, 2, 4)[seed], 3), (0, 2, 3)[seed]
    image, pruner, asked = see(network, [GRIDS[row]], seed), CSP(**options), []
    honest = pruner.score
    pruner.score = lambda i, queries, kv: asked.append((queries, kv)) or honest(i, queries, kv)
    run = ask(network, [PROMPTS[row]], image, pruner, steps=3)
    window = half_up(pruner.obs_rows, len(PROMPTS[row]) + image.coords.shape[1])
    for (queries, whole), kv in zip(asked, run.held[0], strict=True):
        seen, images = queries.seen[0].tolist(), image.coords[0, :, 0].tolist()
        rows = [t for t, (a, b) in enumerate(seen) if a < b][-window:]
        sees = {t: [j for j, i in enumerate(images) if i in range(*seen[t])] for t in rows}
        score = scores(queries.q[0], whole.key[0], sees, pruner.n, len(kv.coords[0]))
        expected: list[list[int]] = [[] for _ in score]
        for i in range(*seen[-1]):
            ours = [j for j, other in enumerate(images) if other == i]
            for kept, s in zip(expected, score, strict=True):
                kept += [ours[j] for j in best(s[ours], half_up(pruner.keep, len(ours)))]
        assert held_by(kv, image) == expected
        assert len(expected) == (1 if pruner.heads == "layer" else whole.key.shape[1])
    assert all(a is b for kvs in run.held for a, b in zip(kvs, run.held[0], strict=True))
    close(run.logits, masked(network, run, [PROMPTS[row]], image))


def test_with_one_row_and_one_set_it_agrees_with_other_methods(small, see, ask):
    """In the first layer, the row of the image token alone: n = 0 here, FastV, Elastic Cache's anchors."""
    for seed in range(3):
        network = small(seed, (1, 2, 4)[seed])
        image = see(network, [[(2, 2)]], seed)
        sets = [held_by(ask(network, [[5, 6, 7, I]], image, pruner, 1).held[0][0], image) for pruner in
                (CSP(0.3, n=0.0, heads="layer"), FastV(0.3, early_caches="trim"), ElasticCache(0.3))]
        assert sets[0] == sets[1] == sets[2] and len(sets[0][0]) == 6


# ----- n while decoding


def test_the_null_key_adds_n_to_the_denominator(attention_of):
    generator = torch.Generator().manual_seed(0)
    for n in 0.5, 1.0, 20.0:
        queries, image, kv = attention_of(torch.rand(2, 3, 6, generator=generator).softmax(-1), 2)
        pruner = told(CSP(4, decode_n=n), image, [3])
        pruner.layer(0, queries, image, kv)
        held, plain = pruner.prefilled([kv])[0], CSP(4)
        plain.scores = pruner.scores
        bare = plain.prefilled([kv])[0]
        q = torch.randn(1, 2, 1, 6, generator=generator)
        Z = (torch.einsum("bhtd,bhnd->bhtn", q, bare.key) / 6 ** 0.5).exp().sum(-1)           # [1, 2, 1]
        without = attend(q, bare.key, bare.value, bare.scores_mask()).view(1, 2, 1, 6)
        ours = attend(q, held.key, held.value, held.scores_mask()).view(1, 2, 1, 6)
        close(ours, without * (Z / (n + Z))[..., None])
        assert held.coords[0, :, -1, 2:].tolist() == [[-2, -2]] * 2 and held.coords[0, :, -1, 0].max() == 0


def test_n_while_decoding_in_a_whole_answer(small, see, ask, masked):
    """In a mixed batch, against the network by hand over what the caches hold; the prompt is read as ever."""
    network = small(2, 2, 3)
    image, pruner = see(network, GRIDS, 3), CSP(0.4, decode_n=2.0)
    run, plain = (ask(network, PROMPTS, image, p, steps=4) for p in (pruner, CSP(0.4)))
    with patch.object(CSP, "merges", True):
        close(run.logits, masked(network, run, PROMPTS, image, pruner))
    assert torch.equal(run.logits[:, 0], plain.logits[:, 0])
    close(run.logits[1], plain.logits[1])
    for row in 0, 2, 3:
        assert (run.logits[row, 1:] - plain.logits[row, 1:]).abs().max() > 1e-4
        assert run.answer.kept[row] == [n + 1 for n in plain.answer.kept[row]]
    assert run.answer.kept[1] == [0.0] * 3
    tiny = ask(network, PROMPTS, image, CSP(0.4, decode_n=1e-30), steps=4)
    close(tiny.logits, plain.logits)


# ----- the text's own caches


@pytest.mark.parametrize("options", [{}, {"heads": "layer", "recent": 3}, {"n": 0.0, "recent": 1.0},
                                   {"obs_rows": 2, "recent": 1}], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_text_that_the_last_rows_look_at(seed, options):
    """And the last of it, within the same budget; a row without an image keeps all. NaN is never read."""
    lengths, imaged = [12, 5, 9, 7, 1], [True, True, True, False, True]
    generator, T, layers = torch.Generator().manual_seed(seed), max(lengths), []
    mask = torch.tensor(imaged)[:, None].expand(-1, 3)
    coords = torch.zeros(*mask.shape, 4, dtype=torch.long)
    pruner = told(CSP(text_keep=0.4, **options), ImageTokens(coords.float(), coords, mask), lengths)
    for i in range(3):
        q, key = 2 * torch.randn(5, 4, T, 8, generator=generator), torch.full((5, 2, 16, 8), math.nan)
        for row, n in enumerate(lengths):
            key[row, :, :n] = torch.randn(2, n, 8, generator=generator)
        layers.append((q, TextKV(key, -key, torch.tensor(lengths))))
        pruner.text_layer(i, q, key[:, :, :T], layers[-1][1].lengths)
    for (q, kv), held in zip(layers, pruner.text_cache(-1, [kv for _, kv in layers]), strict=True):
        assert held.lengths.tolist() == [5, 2, 4, 7, 1]
        for row, n in enumerate(lengths):
            window = half_up(pruner.obs_rows, n + 3 * imaged[row])
            sets = 1 if pruner.heads == "layer" else 2
            sees = {t: [*range(t + 1)] for t in [*range(n)][-window:]}
            score = scores(q[row], kv.key[row, :, :n], sees, pruner.n, sets)
            k = half_up(0.4, n) if imaged[row] else n
            for head in range(2):
                mine = score[head * sets // 2].clone()
                mine[n - min(half_up(pruner.recent, n), k):] = math.inf
                kept = best(mine, k)
                assert torch.equal(held.key[row, head, :k], kv.key[row, head, kept])
                assert torch.equal(held.value[row, head, :k], kv.value[row, head, kept])


@torch.inference_mode()
def without(network, run, prompt: list[int], image: ImageTokens, kept: list[Tensor]) -> Tensor:
    """The logits [steps, V] of a Run whose new tokens do not see the dropped text; `kept` [K, T] of each
    self-attention layer. One pass, no cache; new tokens stand where they would without pruning."""
    ids, decoder, T = torch.tensor(prompt + run.fed[:-1]), network.language_model, len(prompt)
    x, frequencies = decoder.embed_tokens(ids)[None], rotary_frequencies(decoder.config, ids.device)
    angles, kept = rotary_angles(torch.arange(len(ids))[None], frequencies), iter(kept)
    caches = [iter([kvs[i] for kvs in run.held]) for i in range(len(run.read))]
    depth = 0
    for layer in decoder.layers:
        if isinstance(layer, SelfAttentionLayer):
            ours = next(kept)
            mask = torch.ones(len(ours), len(ids), len(ids), dtype=torch.bool).tril()
            mask[:, T:, :T] &= ours[:, None]
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), angles)
            x = x + layer.self_attn.o_proj(attend(q, k, v, mask[None]))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        else:
            start = prompt.index(I)
            new = [layer(x[:, t:t + 1], layer.queries(x[:, t:t + 1]), kv, None, None)
                   for t, kv in enumerate([run.read[depth]] * (T - start) + [next(caches[depth])
                                           for _ in range(len(ids) - T)], start=start)]
            x, depth = torch.cat([x[:, :start], *new], dim=1), depth + 1
    return network.lm_head(decoder.norm(x))[0, T - 1:]


@pytest.mark.parametrize("heads", ["kv_head", "layer"])
@pytest.mark.parametrize("seed", range(2))
def test_dropping_text_is_masking(seed, heads, small, see, ask):
    """Positions go on from where the prompt ended."""
    network, prompt = small(seed, (2, 1)[seed], 3), [5, 6, I, 7, 8, 9, 10, 11, 12, 13]
    image, pruner = see(network, [[(2, 1)]], seed), CSP(0.4, text_keep=0.5, heads=heads, obs_rows=3)
    seen: list[Tensor] = []
    honest = pruner.cut

    def cut(kv, kept):
        if kept.shape[-1] == len(prompt) and not kv.coords.any():
            seen.append(kept[0])
        return honest(kv, kept)
    with patch.object(pruner, "cut", cut):
        run = ask(network, [prompt], image, pruner, steps=5)
    assert len(seen) == 3 and all(kept.sum(-1).eq(5).all() for kept in seen)
    close(run.logits[0], without(network, run, prompt, image, seen))
    assert (run.logits - ask(network, [prompt], image, CSP(0.4, heads=heads, obs_rows=3), steps=5).logits
            )[:, 1:].abs().max() > 1e-4


def test_text_in_a_whole_answer(small, see, ask):
    """Each row as it is alone; a row without an image as if nothing were pruned; fewer entries are held."""
    network, pruner, filled = small(2, 2, 3), CSP(0.4, text_keep=0.4), []
    image, honest = see(network, GRIDS, 5), CSP.text_cache

    def text_cache(self, step, texts):
        texts = honest(self, step, texts)
        filled.append(texts[0].lengths.tolist())
        return texts
    with patch.object(CSP, "text_cache", text_cache):
        run = ask(network, PROMPTS, image, pruner, 4)
    assert filled == [[3 + step, 3 + step, 2 + step, 2 + step] for step in range(4)]
    for row, prompt in enumerate(PROMPTS):
        one, real = image.rows([row]), slice(None) if image.mask is None else image.mask[row]
        one = ImageTokens(one.features[:, real], one.coords[:, real]) if GRIDS[row] else None
        close(run.logits[row], ask(network, [prompt], one, pruner, 4).logits[0])
    close(run.logits[1], ask(network, PROMPTS, image, steps=4).logits[1])
    whole = ask(network, PROMPTS, image, CSP(100, text_keep=0.999), 4)              # rounds to all of it
    close(whole.logits, ask(network, PROMPTS, image, steps=4).logits)


# ----- options


@pytest.mark.parametrize("options", [{"keep": 0}, {"obs_rows": 0}, {"obs_rows": 1.5}, {"n": -1.0},
                                   {"heads": "query"}, {"decode_n": -0.1}, {"text_keep": 0.0},
                                   {"text_keep": 1.1}, {"recent": 0.0}, {"n": math.inf}], ids=str)
def test_a_bad_knob_gets_one_line(options):
    with pytest.raises(ValueError, match=f"csp: {next(iter(options))} is") as error:
        CSP(**options)
    assert "\n" not in str(error.value)


def test_what_it_says_of_itself():
    assert str(CSP(0.3, n=2.0)) == "csp, keep 0.3, n 2.0"
    assert CSP(1.0).keeps_all
    assert not CSP(1.0, decode_n=1.0).keeps_all and not CSP(1.0, text_keep=0.5).keeps_all
