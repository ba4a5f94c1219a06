"""What every rank checks for test_ranks.py."""
from pathlib import Path
from unittest.mock import patch

import torch
from helpers import close, random_tiles, refused
from torch import nn

from generate import generate
from model.cache import rounded_up
from weights import load_model, save_model
from weights.parallel import Gathered, Summed
from weights.ranks import Ranks, join, leave
from weights.room import check_answer

FP32 = 1e-4
IMAGE = 640                                 # <|image|> of the bundled model


def small_things(folder: Path):
    """One start of processes for all that takes no time."""
    ranks = join("cpu")
    for check in (uneven_outputs, inputs_of_all_heads, messages_of_rank_0, checks_of_all, tensors_of_rank_0,
                  tied_head, one_graph, room_for_own_heads, quantised):
        check(ranks, folder)
    leave()


def uneven_outputs(ranks: Ranks, folder: Path):
    """A vocabulary may have one row more or less than the ranks divide evenly."""
    for outputs in 7, 8, 1:
        torch.manual_seed(0)
        whole, x = nn.Linear(5, outputs), torch.randn(2, 3, 5)
        own = nn.Linear(5, len(ranks.part(whole.bias, 0)))
        own.load_state_dict({name: ranks.part(tensor, 0) for name, tensor in whole.state_dict().items()})
        close(Gathered(own, ranks, outputs)(x), whole(x))


def inputs_of_all_heads(ranks: Ranks, folder: Path):
    torch.manual_seed(0)
    whole, x = nn.Linear(6, 4, bias=False), torch.randn(2, 6)
    own = nn.Linear(3, 4, bias=False)
    own.weight = nn.Parameter(ranks.part(whole.weight, 1))
    summed = Summed(own, ranks)
    close(summed(x), whole(x))
    close(summed(ranks.part(x, -1)), whole(x))


def messages_of_rank_0(ranks: Ranks, folder: Path):
    assert ranks.first(lambda: ["said", ranks.rank]) == ["said", 0]
    assert ranks.each(ranks.rank) == [*range(ranks.count)]

    def refuse():
        raise ValueError(f"not by {ranks.rank}")
    with refused("not by 0"):
        ranks.first(refuse)


def checks_of_all(ranks: Ranks, folder: Path):
    """What is wrong on one rank is wrong on all."""
    def too_little_memory():
        if ranks.rank == 1:
            raise ValueError("on rank 1")
    with refused("on rank 1"):
        ranks.check(too_little_memory)
    ranks.check_alike("words", "alike")
    with refused("different words"):
        ranks.check_alike("words", ranks.rank)


def tensors_of_rank_0(ranks: Ranks, folder: Path):
    """Of any shape and kind; None stays None."""
    own = [torch.full((ranks.rank + 1, 2), float(ranks.rank)), None, torch.tensor([ranks.rank == 0]),
           torch.ones(3, dtype=torch.bfloat16).expand(2, 3)]
    zeros, nothing, yes, ones = ranks.from_first(own)
    assert torch.equal(zeros, torch.zeros(1, 2)) and nothing is None and yes.all()
    assert torch.equal(ones, own[3])


def tied_head(ranks: Ranks, folder: Path):
    model, alone = load_model(folder, ranks=ranks), load_model(folder)
    ids = torch.tensor([[1, 2, 3]])
    close(model(ids, [None]), alone(ids, [None]), FP32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with refused("in one process to save it"):
        save_model(model, folder)


def one_graph(ranks: Ranks, folder: Path):
    """A decode step with its sums and gathers is one graph, which the compiler can take."""
    model = load_model(folder, ranks=ranks)
    decode = torch.compile(model.decode, fullgraph=True, backend="eager")
    answers = [generate(model, [[1, 2, 3]], None, 3, (), decode=each) for each in (None, decode)]
    assert answers[0].tokens == answers[1].tokens


def room_for_own_heads(ranks: Ranks, folder: Path):
    """A rank's caches are of its own heads, and so is the memory that they need."""
    model = load_model("tiny", ranks=ranks)
    whole = model.kv_bytes(rounded_up(8), [])["text"]
    with patch("weights.room.free_memory", lambda device: 0.6 * whole):
        check_answer(model, [[1, 2, 3]], None, 5)
    with patch("weights.room.free_memory", lambda device: 0.4 * whole), refused("caches"):
        check_answer(model, [[1, 2, 3]], None, 5)


def quantised(ranks: Ranks, folder: Path):
    """Weights are rounded no worse than in one process; every rank has its share of the bytes."""
    image = load_model("tiny").encode([random_tiles([(1, 1)], load_model("tiny").config.vision)])
    ids = torch.tensor([[1, IMAGE, 5, 6, 7]])
    exact = load_model("tiny").read(ids, image)
    for way in "int8", "int4", "int8+tower":
        alone, model = load_model("tiny", quantize=way), load_model("tiny", quantize=way, ranks=ranks)
        errors = [(each.read(ids, image) - exact).norm() for each in (alone, model)]
        assert 0 < errors[1] < 1.3 * errors[0], (way, errors)
        sizes = [sum(tensor.nbytes for tensor in each.language_model.layers.state_dict().values())
                 for each in (alone, model)]
        assert sizes[1] < 0.58 * sizes[0], (way, sizes)
