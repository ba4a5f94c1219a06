"""The same logits as transformers, once its two deviations from Meta's reference are corrected from outside.

transformers takes each tapped feature one layer late, and lets query positions that see no image attend to
every image. Here its indices are shifted by one, and a hook multiplies the cross-attention of such positions
by 0; a test shows that it differs without either. Random small configurations, every gate open, checkpoints
written by its save_pretrained and read by our load_model. transformers is a test dependency only.
"""
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from helpers import random_tiles, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding, MllamaTextCrossAttention
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from model.config import Config, RopeScaling
from model.image_tokens import Grid, Tiles
from model.layers import rotary_frequencies
from model.llama_vision import LlamaVision
from weights import config_from_dict, load_model

SEEDS = range(24)
RATIOS = {4: [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
          2: [[1, 1], [1, 2], [2, 1]], 1: [[1, 1]], 6: [[2, 3], [1, 1], [3, 2], [6, 1], [1, 5]]}
CLOSE = {"atol": 1e-4, "rtol": 0}
DIFFERENT = 1e-2


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ----- random configurations and batches


def random_config(seed: int) -> MllamaConfig:
    """Tile sizes, head counts, layer placements, tile slots and rotary scalings of all kinds."""
    choose = random.Random(seed)
    head_dim, kv_heads = choose.choice((8, 16)), choose.choice((1, 2, 3))
    layers, vision_layers = choose.randint(3, 6), choose.randint(2, 5)
    slots = choose.choice((4, 4, 4, 4, 2, 1, 6))
    side, patch = choose.choice(((28, 14), (42, 14), (56, 14), (16, 8), (20, 4)))
    vocab, vision_heads = choose.randint(40, 90), choose.choice((1, 2, 4))
    cross = sorted(choose.sample(range(layers), choose.randint(1, layers - 1)))
    taps = sorted(choose.sample(range(1, vision_layers), choose.randint(1, vision_layers - 1)))
    heads = kv_heads * choose.choice((1, 2, 4))
    text = {"vocab_size": vocab, "hidden_size": head_dim * heads,
            "intermediate_size": choose.choice((40, 64)), "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "cross_attention_layers": cross, "rms_norm_eps": choose.choice((1e-5, 1e-6)),
            "max_position_embeddings": 512, "rope_parameters": random_rope(choose),
            "bos_token_id": 0, "eos_token_id": choose.choice((1, [1, 3])), "pad_token_id": 2}
    vision = {"hidden_size": 8 * vision_heads, "intermediate_size": choose.choice((24, 48)),
              "attention_heads": vision_heads, "num_hidden_layers": vision_layers,
              "num_global_layers": choose.randint(1, 2), "image_size": side, "patch_size": patch,
              "max_num_tiles": slots, "supported_aspect_ratios": RATIOS[slots],
              "intermediate_layers_indices": taps, "vision_output_dim": 8 * vision_heads * (1 + len(taps))}
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=vocab,
                        attn_implementation=choose.choice(("eager", "sdpa")))


def random_rope(choose: random.Random) -> dict:
    theta = choose.choice((500000.0, 10000.0))
    if choose.random() < 0.3:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "llama3", "rope_theta": theta, "factor": choose.choice((8.0, 32.0)),
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": choose.choice((16, 64, 8192))}


@dataclass
class Batch:
    """Sequences of text and images; the first `lengths[b]` tokens of sequence b are real."""
    ids: Tensor                                 # [B, T], padded on the right
    lengths: list[int]
    tiles: list[Tiles | None]
    grids: list[list[Grid]]

    @property
    def real(self) -> Tensor:
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]


def random_batch(config: Config, seed: int) -> Batch:
    """One to four sequences with up to three images each, anywhere in the text, side by side or apart.

    One sequence at least has an image, and each seed has another ratio of the first image.
    """
    choose = random.Random(seed)
    ratios, image = config.vision.supported_aspect_ratios, config.image_token_index
    counts = [choose.randint(0, 3) for _ in range(choose.randint(0, 3))]
    counts.insert(choose.randint(0, len(counts)), choose.randint(1, 3))
    texts, grids = [], []
    for count in counts:
        text = [choose.randrange(3, config.text.vocab_size) for _ in range(choose.randint(1, 14))]
        for position in sorted(choose.choices(range(len(text) + 1), k=count), reverse=True):
            text.insert(position, image)
        texts.append(text)
        grids.append([choose.choice(ratios) for _ in range(count)])
    next(own for own in grids if own)[0] = ratios[seed % len(ratios)]
    lengths = [len(text) for text in texts]
    ids = torch.tensor([text + [2] * (max(lengths) - len(text)) for text in texts])
    tiles = [random_tiles(own, config.vision, seed=10 * seed + b) if own else None
             for b, own in enumerate(grids)]
    return Batch(ids, lengths, tiles, grids)


# ----- transformers, corrected from outside


def build(config: MllamaConfig, seed: int, unused_tiles: float = 0.0) -> MllamaForConditionalGeneration:
    vision = config_from_dict(config.to_dict()).vision
    return randomise(MllamaForConditionalGeneration(config), vision, seed, unused_tiles)


def run_transformers(theirs: MllamaForConditionalGeneration, batch: Batch, taps: bool = True,
                     blind: bool = True) -> Tensor:
    """Its logits [B, T, V]; corrected are its taps, and its positions that see no image (`blind`)."""
    inputs = their_inputs(theirs.config, batch)
    vision, hooks = theirs.model.vision_model, []
    if blind and inputs:
        sees = inputs["cross_attention_mask"].flatten(2).any(-1)[..., None]
        hooks = [module.register_forward_hook(lambda module, inputs, output: (output[0] * sees, *output[1:]))
                 for module in theirs.modules() if isinstance(module, MllamaTextCrossAttention)]
    official = vision.intermediate_layers_indices
    vision.intermediate_layers_indices = [i - 1 for i in official] if taps else official
    output = theirs(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False, **inputs)
    vision.intermediate_layers_indices = official
    for hook in hooks:
        hook.remove()
    return output.logits.float()


def their_inputs(config: MllamaConfig, batch: Batch) -> dict[str, Tensor]:
    """Pixels, ratios and masks as its processor gives them; empty for text alone."""
    vision, most = config.vision_config, max(map(len, batch.grids))
    if not most:
        return {}
    shape = len(batch.grids), most
    side, slots = vision.image_size, vision.max_num_tiles
    pixels, ratios = torch.zeros(*shape, slots, 3, side, side), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(*shape, slots, dtype=torch.long)
    mask[..., 0] = 1                                                # also where there is no image
    for b, (tiles, grids) in enumerate(zip(batch.tiles, batch.grids, strict=True)):
        for i, (rows, columns) in enumerate(grids):
            pixels[b, i] = tiles.pixels[i]
            ratios[b, i] = vision.supported_aspect_ratios.index([rows, columns]) + 1
            mask[b, i, :rows * columns] = 1
    prompts = [ids[:length].tolist() for ids, length in zip(batch.ids, batch.lengths, strict=True)]
    ranges = [get_cross_attention_token_mask(prompt, config.image_token_index) for prompt in prompts]
    counts = [[rows * columns for rows, columns in grids] for grids in batch.grids]
    cross = convert_sparse_cross_attention_mask_to_dense(ranges, counts, slots, batch.ids.shape[1])
    return {"pixel_values": pixels, "aspect_ratio_ids": ratios, "aspect_ratio_mask": mask,
            "cross_attention_mask": torch.from_numpy(cross)}


def read_ours(theirs: MllamaForConditionalGeneration, folder: Path) -> LlamaVision:
    theirs.save_pretrained(folder)
    return load_model(folder)


def last(logits: Tensor, batch: Batch) -> Tensor:
    """[B, T, V] -> the logits after the last token of each sequence [B, V]."""
    return logits[torch.arange(len(logits)), torch.tensor(batch.lengths) - 1]


def longer(batch: Batch, tokens: Tensor) -> Batch:
    """One more token [B] at the end of each sequence."""
    ids = torch.nn.functional.pad(batch.ids, (0, 1), value=2)
    ids[torch.arange(len(ids)), batch.lengths] = tokens
    return Batch(ids, [length + 1 for length in batch.lengths], batch.tiles, batch.grids)


def difference(a: Tensor, b: Tensor, batch: Batch) -> float:
    """The largest difference of logits at real tokens."""
    return (a - b)[batch.real].abs().max().item()


# ----- tests


@pytest.mark.parametrize("seed", SEEDS)
def test_same_logits(seed, tmp_path):
    """By forward, and by prefill and decode.

    Every second checkpoint has values in the tables of unused tiles, as a fine-tune may: the encoder's
    general path.
    """
    theirs = build(random_config(seed), seed, unused_tiles=float(seed % 2))
    ours = read_ours(theirs, tmp_path)
    batch = random_batch(ours.config, seed)
    expected = run_transformers(theirs, batch)
    assert expected[batch.real].std() > 0.5                         # so that 1e-4 says something
    torch.testing.assert_close(ours(batch.ids, batch.tiles)[batch.real], expected[batch.real], **CLOSE)
    logits, cache = ours.prefill(batch.ids, batch.lengths, ours.encode(batch.tiles), 2)
    torch.testing.assert_close(logits, last(expected, batch), **CLOSE)
    for token in (5, 17):
        tokens = torch.arange(token, token + len(logits))
        batch = longer(batch, tokens)
        logits = ours.decode(tokens, cache)
        torch.testing.assert_close(logits, last(run_transformers(theirs, batch), batch), **CLOSE)


def test_the_seeds_cover_everything():
    """The random draws above hold what they are said to hold."""
    configs = [config_from_dict(random_config(seed).to_dict()) for seed in SEEDS]
    batches = [random_batch(config, seed) for seed, config in zip(SEEDS, configs, strict=True)]
    texts = [(config.image_token_index, ids[:length].tolist(), len(grids))
             for config, batch in zip(configs, batches, strict=True)
             for ids, length, grids in zip(batch.ids, batch.lengths, batch.grids, strict=True)]
    grids = {tuple(grid) for config, batch in zip(configs, batches, strict=True)
             for own in batch.grids for grid in own if config.vision.max_num_tiles == 4}
    assert grids == {tuple(ratio) for ratio in RATIOS[4]}
    assert {config.vision.max_num_tiles for config in configs} == set(RATIOS)
    assert any([] in batch.grids for batch in batches)
    assert {len(batch.lengths) for batch in batches} == {1, 2, 3, 4}
    assert any(text[0] == image for image, text, _ in texts)
    assert any(text[-1] == image for image, text, _ in texts)
    assert any((image, image) in zip(text, text[1:], strict=False) for image, text, _ in texts)
    assert {count for _, _, count in texts} == {0, 1, 2, 3}
    assert {config.text.rope_scaling is None for config in configs} == {True, False}
    padding = [max(config.vision.max_num_tiles - math.prod(grid) for own in batch.grids for grid in own)
               for config, batch in zip(configs, batches, strict=True)]
    assert sum(tiles > 1 for tiles in padding[1::2]) > 5            # where the general path is needed
    assert any(0 in config.text.cross_attention_layers for config in configs)


@pytest.mark.parametrize("seed", [0, 1])
def test_uncorrected_transformers_differs(seed, tmp_path):
    """In each of the two ways, and in no third."""
    config = random_config(seed)
    theirs = build(config, seed)
    ours = read_ours(theirs, tmp_path)
    image = ours.config.image_token_index
    ids = torch.tensor([[4, 5, 6, image, 7, 8, 9], [4, 8, 6, 5, 7, 2, 2]])
    grids = [[(1, 1)], []]
    batch = Batch(ids, [7, 5], [random_tiles(grids[0], ours.config.vision), None], grids)
    logits = ours(batch.ids, batch.tiles)
    assert difference(run_transformers(theirs, batch), logits, batch) < CLOSE["atol"]
    assert difference(run_transformers(theirs, batch, taps=False), logits, batch) > DIFFERENT
    leaky = run_transformers(theirs, batch, blind=False)
    assert (leaky - logits)[0, :3].abs().max() > DIFFERENT          # text before the image
    assert (leaky - logits)[1, :5].abs().max() > DIFFERENT          # a sequence without an image
    assert difference(run_transformers(theirs, batch, taps=False, blind=False), logits, batch) > DIFFERENT


def test_text_alone(tmp_path):
    """No image in the whole batch: both leave the cross-attention layers out."""
    theirs = build(random_config(3), 3)
    ours = read_ours(theirs, tmp_path)
    batch = Batch(torch.tensor([[4, 5, 6, 7], [8, 9, 2, 2]]), [4, 2], [None, None], [[], []])
    assert difference(run_transformers(theirs, batch), ours(batch.ids, batch.tiles), batch) < CLOSE["atol"]


def test_tied_embeddings(tmp_path):
    """A checkpoint that leaves the head out because it is the embedding."""
    config = random_config(5)
    theirs = build(config, 5)
    vocab = config.text_config.vocab_size
    theirs.lm_head.weight.copy_(theirs.get_input_embeddings().weight[:vocab])
    config.text_config.tie_word_embeddings = True
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if "lm_head" not in name}
    save_file(tensors, file)
    ours = load_model(tmp_path)
    assert ours.config.text.tie_word_embeddings
    batch = random_batch(ours.config, 5)
    assert difference(run_transformers(theirs, batch), ours(batch.ids, batch.tiles), batch) < CLOSE["atol"]


ROPES = [None, RopeScaling(), RopeScaling(original_max_position_embeddings=256),
         RopeScaling(factor=32.0, original_max_position_embeddings=2048),
         RopeScaling(2.0, low_freq_factor=0.5, high_freq_factor=8.0, original_max_position_embeddings=64)]


@pytest.mark.parametrize("scaling", ROPES, ids=str)
@pytest.mark.parametrize("theta", [500000.0, 10000.0])
def test_rotary_frequencies(scaling, theta):
    """At the official head width, where all three parts of the llama3 rule matter."""
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **asdict(scaling)}
    config = MllamaConfig(text_config={"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
                                       "rope_parameters": {**rope, "rope_theta": theta}})
    ours = config_from_dict(config.to_dict()).text
    assert ours.rope_scaling == scaling and ours.rope_theta == theta
    theirs = MllamaRotaryEmbedding(config.text_config).inv_freq
    torch.testing.assert_close(rotary_frequencies(ours, theirs.device), theirs, atol=0, rtol=2e-6)
