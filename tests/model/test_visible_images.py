"""Which images each text token sees: the latest one before it, and those directly before that one."""
import pytest
import torch

from model.image_tokens import visible_images
from model.llama_vision import check_length


def test_a_prompt_and_its_answer_must_fit_into_the_context():
    check_length(1000, 24, 1024)
    with pytest.raises(ValueError, match="make 1025, but the context holds 1024"):
        check_length(1000, 25, 1024)


@pytest.mark.parametrize("row, seen", [
    ("..i...", [(0, 0), (0, 0), (0, 1), (0, 1), (0, 1), (0, 1)]),           # before it: nothing
    (".i..i.", [(0, 0), (0, 1), (0, 1), (0, 1), (1, 2), (1, 2)]),               # the latest only
    ("iii.i.", [(0, 1), (0, 2), (0, 3), (0, 3), (3, 4), (3, 4)]),               # a group, then one alone
    (".i.ii.", [(0, 0), (0, 1), (0, 1), (1, 2), (1, 3), (1, 3)]),
    ("......", [(0, 0)] * 6),
    ("__.i..", [(0, 0), (0, 0), (0, 0), (0, 1), (0, 1), (0, 1)]),               # padded in front
    ("ii.___", [(0, 1), (0, 2), (0, 2), (0, 2), (0, 2), (0, 2)]),               # and behind
])
def test_visible_images(row, seen):
    token_ids = torch.tensor([[{"i": 99, ".": 5, "_": 0}[letter] for letter in row]])
    assert [tuple(pair) for pair in visible_images(token_ids, 99)[0].tolist()] == seen


def test_visible_images_of_a_ragged_batch_are_those_of_its_rows():
    rows = torch.tensor([[9, 1, 9, 9, 1, 1], [0, 0, 1, 9, 1, 1], [0, 1, 1, 1, 1, 1]])
    together = visible_images(rows, 9)
    assert together.shape == (3, 6, 2)
    assert torch.equal(together, torch.cat([visible_images(row[None], 9) for row in rows]))
    assert together[1].tolist() == [[0, 0]] * 3 + [[0, 1]] * 3 and not together[2].any()
