"""Batches need no pad_token_id: whatever it says, each prompt is answered as if it were alone."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_checkpoint import SMALL, single, small_tensors

from generate import generate
from model.llama_vision import LlamaVision
from weights import load_model
from weights.images import ImageProcessor

PADS = {"missing": {}, "null": {"pad_token_id": None}, "below 0": {"pad_token_id": -1},
        "beyond the table": {"pad_token_id": 700}, "beyond 64 bits": {"pad_token_id": 10 ** 30},
        "the image token": {"pad_token_id": 64}, "a word": {"pad_token_id": "pad"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return single(tmp_path, {name: tensor * 0.2 for name, tensor in small_tensors().items()})


def with_pad(folder: Path, pad: dict, image_token: int) -> LlamaVision:
    """The model, after a change of config.json."""
    config = SMALL | {"text_config": SMALL["text_config"] | pad, "image_token_index": image_token}
    (folder / "config.json").write_text(json.dumps(config))
    return load_model(folder)


@pytest.mark.parametrize("image_token", [64, 0, 5])
@pytest.mark.parametrize("pad", PADS)
def test_a_batch_answers_like_single_prompts(folder, pad, image_token):
    model = with_pad(folder, PADS[pad], image_token)
    tiles = ImageProcessor(28)([Image.effect_noise((60, 30), 90).convert("RGB")])
    with torch.inference_mode():
        one = model.encode([tiles])
        several = model.encode([tiles] * 3)
    prompts = [[1, image_token, 9], [image_token, 4, 3, 8, 2, 7], [image_token, 6]]
    together = generate(model, prompts, several, 6, ()).tokens
    assert together == [generate(model, [ids], one, 6, ()).tokens[0] for ids in prompts]
    words = [[token for token in ids if token != image_token] for ids in prompts]
    together = generate(model, words, None, 6, ()).tokens
    assert together == [generate(model, [ids], None, 6, ()).tokens[0] for ids in words]
