"""The network computes what Meta's reference computes: features, logits and greedy continuations.

The data folder holds a tiny random checkpoint in the official layout and, for each case, inputs and what
Meta's implementation makes of them in float64 (stored as float32). Cases with several images have no
continuation there: Meta's loop lets generated tokens lose sight of the images, ours does not, so these are
compared with reading the whole text again for each token.
"""
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import greedy
from safetensors import safe_open
from torch import Tensor

from model.image_tokens import ImageTokens, Tiles
from model.llama_vision import LlamaVision
from weights import load_model

GOLDEN = Path(__file__).parent / "data" / "golden"
PAD = 2
STEPS = 16                              # tokens of a continuation
FP32 = {"atol": 1e-4, "rtol": 0}
# RMSNorm and rotary angles are float32 in every dtype, as in the reference: a few roundings remain.
FP64 = {"atol": 2e-6, "rtol": 0}


@dataclass
class Case:
    """The inputs and golden outputs of one case; the README beside the original data describes them."""
    ids: Tensor                         # [T]
    tiles: Tiles | None
    features: list[Tensor]              # of each image [tiles, P, D]
    logits: Tensor                      # [T, V]
    greedy: list[int] | None            # None for cases with several images


def read_cases() -> dict[str, Case]:
    with safe_open(GOLDEN / "reference.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    cases = {}
    for name in sorted(name.removesuffix(".input_ids") for name in stored if name.endswith(".input_ids")):
        features = [stored[key] for key in sorted(stored) if key.startswith(f"{name}.image_features.")]
        tiles = Tiles(stored[f"{name}.pixel_values"], stored[f"{name}.aspect_ratios"]) if features else None
        greedy = stored[f"{name}.greedy"].tolist() if f"{name}.greedy" in stored else None
        cases[name] = Case(stored[f"{name}.input_ids"], tiles, features, stored[f"{name}.logits"], greedy)
    return cases


CASES = read_cases()
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> LlamaVision:
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def encoded(model) -> dict[str, ImageTokens | None]:
    return {name: model.encode([case.tiles]) for name, case in CASES.items()}


def right_padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def continue_with_cache(model: LlamaVision, prompts: list[Tensor], image: ImageTokens | None,
                        steps: int = STEPS) -> tuple[list[list[int]], Tensor]:
    """Greedy tokens of each sequence, and the logits that each was chosen from [B, steps, V]."""
    return greedy(model, [ids.tolist() for ids in prompts], image, steps)


def continue_without_cache(model: LlamaVision, prompt: Tensor,
                           image: ImageTokens | None) -> tuple[list[int], Tensor]:
    """The same for one row, the whole text read again for each token."""
    ids, seen = prompt[None], []
    for _ in range(STEPS):
        seen.append(model.read(ids, image)[0, -1])
        ids = torch.cat((ids, seen[-1].argmax()[None, None]), dim=1)
    return ids[0, len(prompt):].tolist(), torch.stack(seen)


def check_features(image: ImageTokens, row: int, case: Case, tolerance: dict):
    """The tokens of a sequence are the golden features of its images, in order, and nothing else."""
    features, coords = image.features[row], image.coords[row]
    if image.mask is not None:
        assert not features[~image.mask[row]].any() and (coords[~image.mask[row]] == -1).all()
        features, coords = features[image.mask[row]], coords[image.mask[row]]
    golden = torch.cat([features[:0], *(feature.flatten(0, 1).to(features) for feature in case.features)])
    torch.testing.assert_close(features, golden, **tolerance)
    sizes = [len(feature) for feature in case.features]
    side = range(4)                                                 # tiles of 56 pixels, patches of 14
    patches = [(-1, -1)] + [(r, c) for r in side for c in side]
    expected = [[i, t, r, c] for i, n in enumerate(sizes) for t in range(n) for r, c in patches]
    assert coords.tolist() == expected


def test_the_cases_are_all_there():
    ratios = {f"ratio_{rows}x{columns}" for rows, columns in
              ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))}
    several = {"two_images", "consecutive_images"}
    assert set(CASES) == ratios | several | {"image_first", "text_only"}
    assert {name for name, case in CASES.items() if case.greedy is None} == several
    assert all(len(case.greedy) == STEPS for case in CASES.values() if case.greedy is not None)
    assert all(case.logits.abs().max() > 1 for case in CASES.values())      # so that 1e-4 says something


@every_case
def test_features(encoded, name):
    if CASES[name].tiles is None:
        assert encoded[name] is None
    else:
        check_features(encoded[name], 0, CASES[name], FP32)


@every_case
def test_logits_at_every_position(model, name):
    case = CASES[name]
    torch.testing.assert_close(model(case.ids[None], [case.tiles])[0], case.logits, **FP32)


@every_case
def test_greedy_continuation(model, encoded, name):
    """By prefill and decode, and by reading the whole text for each token: the same tokens and logits."""
    case = CASES[name]
    [cached], cached_logits = continue_with_cache(model, [case.ids], encoded[name])
    plain, plain_logits = continue_without_cache(model, case.ids, encoded[name])
    assert cached == plain
    assert case.greedy is None or plain == case.greedy
    torch.testing.assert_close(cached_logits[0], plain_logits, **FP32)
    torch.testing.assert_close(cached_logits[0, 0], case.logits[-1], **FP32)


@pytest.mark.parametrize("name", ["two_images", "consecutive_images", "ratio_1x2"])
def test_prefill_of_every_prefix(model, name):
    """Also those that end before, at and between images, of which only the ones named so far are given."""
    case = CASES[name]
    for length in range(1, len(case.ids) + 1):
        ids = case.ids[:length]
        named = int((ids == model.config.image_token_index).sum())
        tiles = Tiles(case.tiles.pixels[:named], case.tiles.grid[:named])
        logits, cache = model.prefill(ids[None], [length], model.encode([tiles]), 0)
        torch.testing.assert_close(logits[0], case.logits[length - 1], **FP32)
        assert cache.positions.tolist() == [length]


@pytest.mark.parametrize("name", ["ratio_1x2", "text_only"])
def test_decoding_from_every_prefix(model, encoded, name):
    """The rest of a prompt, decoded token by token, gets the logits that reading it at once gives."""
    case = CASES[name]
    images = (case.ids == model.config.image_token_index).nonzero().flatten().tolist()
    for length in range(max(images, default=0) + 1, len(case.ids)):
        _, cache = model.prefill(case.ids[None, :length], [length], encoded[name], len(case.ids) - length)
        for position in range(length, len(case.ids)):
            logits = model.decode(case.ids[position:position + 1], cache)
            torch.testing.assert_close(logits[0], case.logits[position], **FP32)


def test_all_cases_in_one_ragged_batch(model, encoded):
    """Text only, one image, several; lengths and grids of all kinds. The longest row has no padding."""
    cases = list(CASES.values())
    prompts, lengths = [case.ids for case in cases], [len(case.ids) for case in cases]
    assert len(set(lengths)) > 2
    image = model.encode([case.tiles for case in cases])
    for row, case in enumerate(cases):
        check_features(image, row, case, FP32)
    logits = model(right_padded(prompts), [case.tiles for case in cases])
    for row, case in enumerate(cases):
        torch.testing.assert_close(logits[row, :lengths[row]], case.logits, **FP32)
    greedy, seen = continue_with_cache(model, prompts, image)
    for row, (name, case) in enumerate(CASES.items()):
        torch.testing.assert_close(seen[row, 0], case.logits[-1], **FP32)
        if case.greedy is None:
            expected, alone = continue_without_cache(model, case.ids, encoded[name])
            torch.testing.assert_close(seen[row], alone, **FP32)
        assert greedy[row] == (case.greedy or expected), name


def test_float64_agrees_more_closely():
    """With rounding out of the way: golden features and logits, and a batch like its rows alone."""
    model = load_model(GOLDEN, dtype="float64")
    chosen = ["ratio_1x1", "ratio_2x2", "two_images", "consecutive_images", "text_only"]
    cases = [CASES[name] for name in chosen]
    image = model.encode([case.tiles for case in cases])
    assert image.features.dtype == torch.float64
    logits = model.read(right_padded([case.ids for case in cases]), image)
    _, batched = continue_with_cache(model, [case.ids for case in cases], image, steps=4)
    for row, case in enumerate(cases):
        single = model.encode([case.tiles])
        if single is not None:
            check_features(image, row, case, FP64)
            tokens = single.features.shape[1]
            torch.testing.assert_close(image.features[row, :tokens], single.features[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(logits[row, :len(case.ids)], case.logits, **FP64)
        _, alone = continue_with_cache(model, [case.ids], single, steps=4)
        torch.testing.assert_close(batched[row], alone[0], **FP64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way, most", [("int8", 0.03), ("int4", 0.4)])
def test_quantised_weights_stay_near(way, most, dtype):
    """Random weights are the worst case: the logits of trained ones move less."""
    model = load_model(GOLDEN, dtype=dtype, quantize=way)
    far = []
    for case in CASES.values():
        logits = model(case.ids[None], [case.tiles])[0]
        far.append(((logits - case.logits).norm() / case.logits.norm()).item())
    assert 1e-3 < max(far) <= most
