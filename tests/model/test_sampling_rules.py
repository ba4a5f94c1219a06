"""top-k and the repetition penalty, held against the logits processors of transformers."""
import pytest
import torch
from helpers import refused
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from model.sampling import Sampler

V = 40
IMAGE = V                                   # an id without a logit, as <|image|>


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(sampler: Sampler, logits: Tensor, times: int = 2000) -> set[int]:
    return {sampler(logits[None]).item() for _ in range(times)}


@pytest.mark.parametrize("top_k", [1, 2, 5, V - 1])
def test_top_k_draws_what_transformers_leaves(top_k):
    logits = 0.2 * random_logits(V)
    left = TopKLogitsWarper(top_k)(None, logits[None])[0].isfinite()
    assert left.sum() == top_k
    assert drawn(Sampler(2.0, 1.0, top_k=top_k), logits) == set(left.nonzero()[:, 0].tolist())


def test_top_k_keeps_what_ties_with_the_last():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    left = TopKLogitsWarper(2)(None, logits[None])[0].isfinite()
    assert left.nonzero()[:, 0].tolist() == [1, 2, 3, 4]
    assert drawn(Sampler(1.0, 1.0, top_k=2), logits, 300) == {1, 2, 3, 4}


@pytest.mark.parametrize("top_k", [0, V, V + 7, 10 ** 9])
def test_top_k_of_all_changes_nothing(top_k):
    logits = random_logits(300, 1, V)
    plain, all_of_them = Sampler(1.5, 0.9, seed=3), Sampler(1.5, 0.9, seed=3, top_k=top_k)
    assert [plain(row).item() for row in logits] == [all_of_them(row).item() for row in logits]


def test_top_p_counts_among_what_top_k_leaves():
    logits = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]).log()      # of the first two, the first has 0.71
    assert drawn(Sampler(1.0, 0.7, top_k=2), logits, 300) == {0}
    assert drawn(Sampler(1.0, 0.7, top_k=0), logits, 300) == {0, 1, 2}


def by_transformers(penalty: float, top_k: int, ids: list[int], logits: Tensor) -> Tensor:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(0.7),
                                      TopKLogitsWarper(top_k)])
    return processors(torch.tensor([[token for token in ids if token < V]]), logits[None].clone())[0]


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.7])
def test_the_penalty_is_that_of_transformers(penalty):
    """Of prompt and answer, step by step, greedy and among the likeliest, in a batch of uneven prompts."""
    prompts = [[3, IMAGE, 7, 7, 11], [5], [0, 1, 2, IMAGE, IMAGE]]
    greedy = Sampler(repetition_penalty=penalty).after(prompts)
    hot = Sampler(0.7, 1.0, top_k=3, repetition_penalty=penalty).after(prompts)
    said, hot_said = [list(ids) for ids in prompts], [list(ids) for ids in prompts]
    changed = 0
    for step in range(30):
        logits = random_logits(len(prompts), V, seed=step % 3 if penalty > 1 else step)
        changed += int((greedy_tokens := greedy(logits)).ne(logits.argmax(-1)).sum())
        hot_tokens = hot(logits)
        for b in range(len(prompts)):
            assert greedy_tokens[b] == by_transformers(penalty, 1, said[b], logits[b]).argmax()
            assert by_transformers(penalty, 3, hot_said[b], logits[b])[hot_tokens[b]].isfinite()
            said[b].append(int(greedy_tokens[b]))
            hot_said[b].append(int(hot_tokens[b]))
    assert changed > 5


def test_a_batch_is_penalised_as_each_prompt_alone():
    prompts = [[3, 7, 11], [5], [0, 1, 2, IMAGE]]
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 4, "top_k": 6, "repetition_penalty": 1.4}
    together = Sampler(**settings).after(prompts)
    alone = [Sampler(**settings).after([ids]) for ids in prompts]
    for logits in random_logits(25, len(prompts), V):
        assert together(logits).tolist() == [one(row[None]).item()
                                             for one, row in zip(alone, logits, strict=True)]


def test_each_answer_begins_with_its_own_prompt():
    """What an earlier answer said does not count in the next one."""
    sampler = Sampler(repetition_penalty=50.0)
    logits = torch.tensor([[1.0, 0.9, 0.8]])
    for _ in range(2):
        sample = sampler.after([[2]])
        assert [sample(logits).item() for _ in range(4)] == [0, 1, 0, 0]


def test_a_penalty_of_1_is_the_sampler_itself():
    sampler = Sampler(1.0)
    assert sampler.after([[1]]) is sampler
    with refused("needs the prompts: pass sampler.after"):
        Sampler(repetition_penalty=1.1)(torch.zeros(1, 3))


@pytest.mark.parametrize(("name", "value"), [
    ("top_k", -1), ("top_k", 2 ** 63), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
    ("repetition_penalty", float("nan")), ("repetition_penalty", float("inf")), ("repetition_penalty", 1e9)])
def test_what_is_refused(name, value):
    with refused(f"^{name.replace('_', '-')} is .*but must be"):
        Sampler(**{name: value})
