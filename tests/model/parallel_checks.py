"""What every rank checks for test_parallel.py: its share of the golden model, and that all ranks agree."""
import torch
from helpers import close, greedy
from test_golden import CASES, GOLDEN

from model.llama_vision import LlamaVision
from weights import load_model
from weights.ranks import join, leave

FP32 = 1e-4
SHARE = {2: 0.55, 4: 0.32}                  # of the model's bytes; norms and the like are on every rank


def golden(names: list[str], continued: str = ""):
    """Logits at every position, and continuations, are those of Meta's reference, and alike on all ranks."""
    ranks = join("cpu")
    model, alone = load_model(GOLDEN, ranks=ranks), load_model(GOLDEN)
    assert held(model) < SHARE[ranks.count] * held(alone)
    for name in names:
        case = CASES[name]
        logits = model(case.ids[None], [case.tiles])[0]
        close(logits, case.logits, FP32)
        assert all(torch.equal(logits, other) for other in ranks.each(logits))
        if name == continued:
            tokens, _ = greedy(model, [case.ids.tolist()], model.encode([case.tiles]), len(case.greedy))
            assert tokens == [case.greedy]
    leave()


def held(model: LlamaVision) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
