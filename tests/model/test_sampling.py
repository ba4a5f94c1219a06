"""Transcript: tokens are recorded, handed on and checked; on a GPU each step is read one step behind."""
import pytest
import torch
from torch import Tensor

from model.sampling import Transcript, limits_of

CPU = torch.device("cpu")
STOP = 9


def transcript(sequences: int, behind: int = 0) -> tuple[Transcript, list[tuple[int, int]]]:
    """One that reads so many steps behind, as it does on a GPU, and what it emits."""
    emitted = []
    made = Transcript(sequences, (STOP,), lambda sequence, token: emitted.append((sequence, token)), CPU)
    made._lag = behind
    return made, emitted


def push(made: Transcript, *tokens: int, logits: Tensor | None = None):
    made.push(torch.tensor(tokens), torch.zeros(len(tokens), 3) if logits is None else logits)


@pytest.mark.parametrize("behind", [0, 1])
def test_answers_end_at_their_stop_tokens(behind):
    made, emitted = transcript(2, behind)
    for tokens in (5, 6), (STOP, 7), (8, STOP):
        assert not made.ended
        push(made, *tokens)
    made.finish()
    assert made.ended and made.tokens == [[5], [6, 7]]
    assert emitted == [(0, 5), (1, 6), (1, 7)]
    assert made.decoded == 3            # the first tokens come from prefill; stop tokens count


@pytest.mark.parametrize("behind", [0, 1])
def test_answers_end_at_their_own_limits(behind):
    made, emitted = transcript(3, behind)
    made.limits = [1, 3, 2]
    for tokens in (5, 5, STOP), (6, 6, 6), (7, 7, 7):
        push(made, *tokens)
    made.finish()
    assert made.ended and made.tokens == [[5], [5, 6, 7], []]
    assert emitted == [(0, 5), (1, 5), (1, 6), (1, 7)] and made.decoded == 2


def test_limits_are_one_number_or_one_for_each():
    assert limits_of(7, 2) == [7, 7] and limits_of((3, 4), 2) == [3, 4]
    with pytest.raises(ValueError, match="1 numbers for 2 prompts"):
        limits_of([3], 2)


@pytest.mark.parametrize("behind", [0, 1])
def test_emit_may_end_an_answer(behind):
    """By True itself: what else it returns, as `write` does, means nothing."""
    made, _ = transcript(2, behind)
    made.emit = lambda sequence, token: True if (sequence, token) == (0, 6) else 1
    for tokens in (5, 5), (6, 6), (7, 7), (8, STOP):
        push(made, *tokens)
    made.finish()
    assert made.ended and made.tokens == [[5, 6], [5, 6, 7]]


def test_a_gpu_is_read_one_step_behind():
    made, emitted = transcript(1, behind=1)
    push(made, 5)
    assert emitted == []
    push(made, 6)
    assert emitted == [(0, 5)]
    push(made, STOP)
    assert emitted == [(0, 5), (0, 6)] and not made.ended
    push(made, 7)                       # decoded before the end was known
    assert made.ended and made.finish().tokens == [[5, 6]] and made.decoded == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("behind", [0, 1])
def test_logits_that_are_not_finite_are_never_an_answer(value, behind):
    made, emitted = transcript(2, behind)
    push(made, 5, 5)
    logits = torch.zeros(2, 3)
    logits[1, 2] = value
    with pytest.raises(ValueError, match="logits are not finite.*bf16 and fp32"):
        push(made, 6, 6, logits=logits)
        made.finish()
    assert (1, 6) not in emitted


def test_what_an_ended_answer_would_have_been_is_not_looked_at():
    made, _ = transcript(2)
    push(made, STOP, 5)
    push(made, 1, 6, logits=torch.tensor([[float("nan")] * 3, [0.0] * 3]))
    assert made.tokens == [[], [5, 6]]
