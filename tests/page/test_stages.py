"""What the stages cost: by hand, and together what the model itself counts."""
from dataclasses import replace

import pytest
import torch
from helpers import refused
from torch.utils.flop_counter import FlopCounterMode

from model.config import VisionConfig
from page.stages import ROOT, STAGES, Reads, everything, like, place, shape_of, spans, stages
from weights import read_config
from weights.shapes import ELEVEN, NINETY

TINY = read_config(ROOT / "weights" / "tiny")
GRIDS = VisionConfig.supported_aspect_ratios
BOTH = {"tiny": TINY, "11B": ELEVEN}
PRUNED = Reads((1, 2), (100, 10, 10), (100, 10, 10), (20, 10.5, 10))


def test_costs_of_the_bundled_checkpoint_by_hand():
    """Two tiles, 20 tokens of a question. D 160, two KV heads of 40, four self- and three cross-attention
    layers, an MLP of 384 and 640 words; encoder width 128, taps 384 wide with the final state."""
    found = {stage.name: stage.full["tiny"] for stage in stages(BOTH, (1, 2), 20)}
    layer = 4 * 160 ** 2 + 6 * 160 * 384                    # q, o and MLP for one token: multiply and add
    own_kv, head = 4 * 160 * 80, 2 * 160 * 640
    pairs = 20 * 21 // 2
    by_hand = {
        "pixels": (4 * 3 * 112 * 112 * 2, 0),
        "patches": (3 * 50 * 128 * 2, 2 * 3 * 49 * 3 * 16 * 16 * 128),      # two tiles, one for all padding
        "projector": (100 * 160 * 2, 2 * 100 * 384 * 160),
        "K/V of the cross-attention layers": (3 * 100 * 2 * 80 * 2, 3 * 100 * 2 * 2 * 160 * 80),
        "image KV cache": (3 * 100 * 2 * 80 * 2, 0),
        "prefill": (4 * 20 * 2 * 80 * 2,
                    20 * 7 * layer + 4 * (20 * own_kv + 4 * 160 * pairs) + 3 * 4 * 160 * 20 * 100 + head),
        "a decoded token": (2 * weights_read() + 4 * 21 * 2 * 80 * 2 + 3 * 100 * 2 * 80 * 2,
                            7 * layer + 4 * (own_kv + 4 * 160 * 21) + 3 * 4 * 160 * 100 + head)}
    assert {name: (found[name].bytes, found[name].flops) for name in by_hand} == by_hand
    assert found["vision encoder"].bytes == 100 * 384 * 2
    assert [found[name].shape for name in ("pixels", "patches", "vision encoder", "projector")] == [
        "[4, 3, 112, 112]", "[3, 50, 128]", "[100, 384]", "[100, 160]"]


def weights_read() -> int:
    """Numbers of the decoder that a token needs: not the embedding, nor what makes image keys and values."""
    mlp, norms, d = 3 * 160 * 384, 2 * 160, 40
    own = 2 * 160 * 160 + 2 * 160 * 80 + mlp + norms
    cross = 2 * 160 * 160 + mlp + norms + d + 2             # the norm of queries, two gates
    return 4 * own + 3 * cross + 160 + 640 * 160


def test_costs_of_the_official_model():
    *_, kv, cache, _, decoded = stages({"11B": ELEVEN}, (2, 2), 128)
    assert cache.full["11B"].bytes == kv.full["11B"].bytes == 209_846_272          # docs/ARCHITECTURE.md
    assert kv.full["11B"].flops == 8 * 6404 * 2 * 2 * 4096 * 1024
    assert kv.full["11B"].shape == "8 x 2 x [8, N, 128]" and kv.full["11B"].count == "6404 tokens"
    assert decoded.full["11B"].flops / decoded.full["11B"].bytes == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("config", [TINY, ELEVEN, NINETY], ids=["tiny", "11b", "90b"])
def test_the_stages_together_are_what_the_model_counts(config, grid):
    found = [stage.full["m"] for stage in stages({"m": config}, grid, 33)]
    flops = shape_of(config, torch.bfloat16).flops(33, [grid], 2)
    assert sum(cost.flops for cost in found[:4]) == flops["encode"]
    assert sum(cost.flops for cost in found[4:7]) == flops["prefill"]
    assert found[7].flops == flops["decode"]
    assert all(cost.flops > 0 for i, cost in enumerate(found) if i not in (0, 5))


def test_patches_cost_what_torch_counts_for_the_convolution():
    """Of three tiles, and one that stands for all padding."""
    encoder = shape_of(TINY, torch.bfloat16).vision_model
    pixels = torch.empty(4, 3, 112, 112, device="meta", dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        encoder.patch_embedding(pixels)
    assert stages({"tiny": TINY}, (1, 3), 5)[1].full["tiny"].flops == counter.get_total_flops()


def test_pruning_changes_the_stages_after_the_projector():
    found = stages({"tiny": TINY}, (1, 2), 20, PRUNED)
    assert [stage.pruned != stage.full for stage in found] == [False] * 4 + [True] * 4
    before, after = found[4].full["tiny"], found[4].pruned["tiny"]
    assert after.flops == before.flops * 120 // 300 and after.count == "10 to 100 tokens"
    assert found[5].pruned["tiny"].bytes == (20 + 10.5 + 10) * 2 * 80 * 2
    assert found[6].full["tiny"].flops - found[6].pruned["tiny"].flops == 4 * 160 * 20 * 180
    assert found[7].full["tiny"].bytes - found[7].pruned["tiny"].bytes == (300 - 40.5) * 320
    assert all(stage.pruned is None for stage in stages({"tiny": TINY}, (1, 2), 20))


def test_a_smaller_image_costs_less_from_the_patches_on():
    found = stages({"tiny": TINY}, (2, 2), 20, Reads((1, 1), (50,) * 3, (50,) * 3, (50,) * 3))
    alone = stages({"tiny": TINY}, (1, 1), 20)
    assert [stage.pruned["tiny"] for stage in found] == [stage.full["tiny"] for stage in alone]


def test_another_model_reads_the_same_shares():
    whole, large = (everything(shape_of(config, torch.bfloat16), (1, 2)) for config in (TINY, ELEVEN))
    other = like(replace(PRUNED, cached=(20, 10, 30)), whole, large)
    assert other.projected == other.attended == (3202,) + (320,) * 7
    assert other.cached == (640,) + (640,) * 7          # a fifth in the first layer, and in the mean later
    assert like(PRUNED, whole, whole) == PRUNED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_follow_the_type(dtype):
    found = stages({"tiny": TINY}, (1, 1), 4, dtype=dtype)
    assert found[0].full["tiny"].bytes == 4 * 3 * 112 * 112 * dtype.itemsize
    assert found[5].full["tiny"].bytes == 48_000 * dtype.itemsize // 2


def test_a_grid_that_the_model_has_not_is_refused():
    with refused("3 x 3 tiles"):
        stages(BOTH, (3, 3), 20)


def test_counts_of_layers_are_spans():
    assert spans((7, 7.0)) == "7" and spans((10.5, 3, 20)) == "3 to 20"


@pytest.mark.parametrize("function", [part for _, _, _, *both in STAGES for part in both],
                         ids=lambda function: function.__qualname__)
def test_every_stage_shows_the_source_that_its_line_names(function):
    where = place(function)
    lines = (ROOT / where.path).read_text(encoding="utf-8").splitlines(keepends=True)
    shown = where.source.splitlines(keepends=True)
    assert lines[where.line - 1:where.line - 1 + len(shown)] == shown
    assert any(f" {where.name.split('.')[-1]}" in line for line in shown[:2])
    assert str(where) == f"{where.path}:{where.line}"
