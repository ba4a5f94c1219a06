"""What Trimmed Llama prunes, what it does not, and what that saves as its paper (arXiv 2504.00557) counts."""
import pytest
import torch
from helpers import SHARES, I, dropped_is_nan, kept, random_image, small_network
from loops import projected_tokens
from reference import forced
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.llama_vision import LlamaVision
from pruning.methods.trimmed_llama import TrimmedLlama, flops_reduction

PROMPT = [5, 6, I, 7, 8, 9]

# ----- what is pruned, and what is not


def outputs_of_the_first_layer(network: LlamaVision, run) -> list[Tensor]:
    seen, layer = [], network.language_model.cross_layers[0]
    hook = layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_the_first_layer_reads_everything(seed):
    """Bit for bit in prefill, and with its full cache in the first step too."""
    network, image = small_network(seed, SHARES[seed]), random_image(20, seed=seed)
    full, trim, plain = (outputs_of_the_first_layer(network, lambda p=p: forced(network, [PROMPT], image, p))
                         for p in (TrimmedLlama(0.1, early_caches="full"), TrimmedLlama(0.1), None))
    assert len(full) == len(trim) == len(plain) == 2
    assert torch.equal(full[0], plain[0]) and torch.equal(trim[0], plain[0])
    assert (trim[1] - plain[1]).abs().max() > 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("early", ["trim", "full"])
def test_cache_lengths(seed, early):
    """One set everywhere, the same in every step; the first layer's cache full, or cut like the rest."""
    network, image = small_network(seed, SHARES[seed], 4), random_image(20, seed=seed)
    run = forced(network, [PROMPT], image, TrimmedLlama(0.1, early_caches=early), steps=4)
    union = kept(run.read[1], image)
    assert 2 <= len(union) < 20
    for kvs in run.held:
        assert [kv.key.shape[2] for kv in kvs] == [20 if early == "full" else len(union)] + [len(union)] * 3
        assert all(kept(kv, image) == union for kv in kvs[1:])
    assert run.answer.kept == [[float(kv.key.shape[2]) for kv in run.held[0]]]


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_keys_and_values_of_dropped_tokens_are_never_made(seed):
    """NaN in their features after the choice changes nothing; in a batch where each keeps another number."""
    network, pruner = small_network(seed, SHARES[seed % 3], 3), TrimmedLlama(0.1)
    prompts, image = [PROMPT, [I, 11]], random_image(20, seed=seed, batch=2)
    expected = forced(network, prompts, image, pruner)
    chosen = pruner.kept
    assert chosen[0].sum() != chosen[1].sum()
    with dropped_is_nan(TrimmedLlama):
        run, sizes = projected_tokens(network, lambda: forced(network, prompts, image, TrimmedLlama(0.1)))
    assert image.features.isnan().any() and run.logits.isfinite().all()
    assert torch.equal(run.logits, expected.logits)
    most = int(chosen.sum(1).max())
    assert sizes == [20, 20] + [most] * 4 and most < 20


def test_operations_saved_are_those_of_the_dropped_tokens():
    """As PyTorch counts them in linear layers: keys and values of each dropped token in each later layer."""
    network, image, totals = small_network(1, 2, 3), random_image(20, seed=1), []
    for pruner in None, TrimmedLlama(0.1):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run = forced(network, [[I, 5, 6, 7]], image, pruner, steps=1)
        operations = counter.get_flop_counts()["Global"]
        totals.append(sum(n for name, n in operations.items() if str(name) in ("aten.mm", "aten.addmm")))
    dropped, width, kv_width = 20 - run.read[-1].key.shape[2], 32, 2 * 8
    assert totals[0] - totals[1] == 2 * 2 * (2 * dropped * width * kv_width) and dropped > 4


# ----- what the paper counts


@pytest.mark.parametrize("image, saved", [
    (6404, {(32, 0.5): 38.7, (32, 0.4): 46.4, (128, 0.5): 28.9, (128, 0.4): 34.6, (512, 0.5): 15.0,
            (512, 0.4): 18.0}),
    (1601, {(32, 0.5): 28.7, (32, 0.4): 34.4, (128, 0.5): 14.3, (128, 0.4): 17.1, (512, 0.5): 5.0,
            (512, 0.4): 6.1})])
def test_flops_of_appendix_a3(image, saved):
    for (text, ratio), percent in saved.items():
        assert round(100 * flops_reduction(text, image, ratio), 1) == percent
    assert flops_reduction(100, image, 1.0) == 0


@pytest.mark.parametrize("cross, saving", [(8, 0.4375), (20, 0.475)], ids=["11B", "90B"])
def test_bytes_saved_where_the_first_cache_stays_full(cross, saving):
    """(C - 1) / C · (1 - R) at R = 0.5."""
    network, image = small_network(1, 2, cross), random_image(20, seed=1)
    half = TrimmedLlama(0.5, early_caches="full", budget=0.5)
    plain, pruned = (forced(network, [[I, 5, 6]], image, pruner).answer for pruner in (None, half))
    assert 1 - pruned.image_kv_bytes / plain.image_kv_bytes == saving
    assert pruned.kept == [[20.0] + [10.0] * (cross - 1)]
