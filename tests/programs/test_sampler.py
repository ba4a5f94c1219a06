"""The sampler: top-p, temperature, and seeds."""
import re
from collections import Counter

import pytest
import torch

from generate import Sampler


def kept_by_top_p(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Meta's rule, one token at a time: in falling order, a token goes if those before it hold over top_p."""
    p = torch.tensor(logits, dtype=torch.float64).div(temperature).exp()
    p = (p / p.sum()).tolist()
    kept, before = {}, 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if before > top_p:
            break
        kept[token] = p[token]
        before += p[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


LOGITS = [0.3, 2.0, -1.0, 1.1, 1.6, 0.0, -0.4, 0.9]


@pytest.mark.parametrize("temperature, top_p, size", [
    (1.0, 1.0, 8), (1.0, 0.9, 5), (1.0, 0.5, 2), (1.0, 1e-6, 1), (0.5, 0.9, 3), (3.0, 0.7, 5)])
def test_top_p_draws_as_the_rule_says(temperature, top_p, size):
    expected = kept_by_top_p(LOGITS, temperature, top_p)
    assert len(expected) == size
    logits = torch.tensor([LOGITS])
    one = Sampler(temperature, top_p, seed=0)
    along = Counter(one(logits).item() for _ in range(3000))                    # one seed, many tokens
    across = Counter(Sampler(temperature, top_p, seed)(logits).item() for seed in range(3000))
    for counts in along, across:
        assert set(counts) == set(expected)
        for token, share in expected.items():
            assert abs(counts[token] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9


def test_a_token_stays_where_those_before_it_hold_exactly_top_p():
    sampler = Sampler(1.0, 0.5)                     # of four equal tokens, two hold 0.5: the third stays
    assert {sampler(torch.zeros(1, 4)).item() for _ in range(300)} == {0, 1, 2}


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [7, 31]] = 0.0
    sampler = Sampler(2.0, 1.0)
    assert {sampler(logits).item() for _ in range(300)} == {7, 31}


def test_temperature_0_is_the_argmax_and_so_is_nearly_0():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler()(logits), logits.argmax(-1))
    for temperature in 1e-3, 1e-30, 1e-45, 5e-324:
        assert torch.equal(Sampler(temperature, 1.0)(logits), logits.argmax(-1)), temperature


def test_seeds_are_reproducible_and_differ():
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> list[int]:
        sampler = Sampler(1.0, 1.0, seed)
        return [sampler(logits).item() for _ in range(20)]

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 5                    # a sampler goes on drawing, it does not begin again
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_draw_as_they_would_alone():
    logits = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(0))
    together, alone = Sampler(1.0, 0.9, seed=4), [Sampler(1.0, 0.9, seed=4) for _ in range(3)]
    for step in logits:
        expected = [sampler(row[None]).item() for sampler, row in zip(alone, step, strict=True)]
        assert together(step).tolist() == expected


@pytest.mark.parametrize("values", [(-0.1,), (float("nan"),), (float("inf"),), (1.0, 0.0), (1.0, -1.0),
                                    (1.0, 1.01), (1.0, float("nan"))])
def test_a_sampler_refuses_what_it_cannot_do(values):
    name, value = ("temperature", "top-p")[len(values) - 1], values[-1]
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(str(value))}, but must be [^\n]*$"):
        Sampler(*values)
