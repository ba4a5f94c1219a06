"""QueCC's formulas (arXiv 2411.03312 and its code) in loops over patches, and random images and compressors.

D width of text, E of the encoder's final states, F of all states of a patch, g cells a side.
"""
import math
from functools import partial

import torch
from helpers import noise, tile_coords
from torch import Tensor

from model.image_tokens import EncoderStates, ImageTokens
from pruning.methods.quecc import Compressor

E, F, D = 6, 12, 10


def tiles(side: int, counts: list[int], seed: int = 0, states: int = F, width: int = D) -> ImageTokens:
    """One image of random features in each sequence: `counts` are its tiles, of side x side patches."""
    size, most = side ** 2 + 1, max(counts)
    coords = torch.tensor([tile_coords(most, side)] * len(counts))
    mask = torch.arange(most * size) < torch.tensor(counts)[:, None] * size
    coords = torch.where(mask[..., None], coords, -1)
    features, known = (noise(len(counts), most * size, w, seed=seed + w) * mask[..., None]
                       for w in (width, states))
    final = known[..., :E]
    return ImageTokens(features, coords, None if mask.all() else mask,
                       EncoderStates([None] * len(counts), known, final, final))


def random_compressor(stride: int, seed: int = 0, width: int = E, states: int = F,
                      text: int = D) -> Compressor:
    """With nothing left at its start: every bias and norm, and what is added to the mean."""
    compressor = Compressor(width, states, text, stride).requires_grad_(False)
    for i, (name, parameter) in enumerate(sorted(compressor.named_parameters())):
        drawn = noise(*parameter.shape, seed=1000 * seed + i)
        is_norm = name.endswith(("1.weight", "3.weight"))
        parameter.copy_(1 + 0.3 * drawn if is_norm else drawn / parameter[0].numel() ** 0.5)
    return compressor


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt() * weight + bias


def mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    first, second = (partial(torch.addmv, w[f"{name}.{i}.bias"], w[f"{name}.{i}.weight"]) for i in (0, 2))
    h = first(x)
    return norm(second(h * (1 + torch.erf(h / 2 ** 0.5)) / 2), w[f"{name}.3.weight"], w[f"{name}.3.bias"])


def by_hand(features: Tensor, states: Tensor, question: Tensor, w: dict[str, Tensor], side: int,
            stride: int, heads: int = 1) -> Tensor:
    """The new tokens of one tile: features [side², D], states [side², F], question [D] -> [g², D]."""
    w = {name: tensor.double() for name, tensor in w.items()}
    features, states, question = features.double(), states.double(), question.double()
    width, tokens = len(w["shrink.weight"]), []
    asked = norm(w["question.0.weight"] @ question + w["question.0.bias"], w["question.1.weight"],
                 w["question.1.bias"])
    (wq, wk, wv), (bq, bk, bv) = (w[f"attention.in_proj_{part}"].split(width) for part in ("weight", "bias"))
    for top in range(0, side, stride):
        for left in range(0, side, stride):
            cell = [(r, c) for r in range(top, min(top + stride, side))
                    for c in range(left, min(left + stride, side))]
            query = w["shrink.bias"].clone()
            for r, c in cell:
                seen = mlp(states[r * side + c][:width] + asked, w, "query")
                query += w["shrink.weight"][:, 0, r - top, c - left] * seen
            query = wq @ query + bq
            keys = [wk @ mlp(states[r * side + c], w, "key") + bk for r, c in cell]
            values = [wv @ mlp(states[r * side + c], w, "value") + bv for r, c in cell]
            found, d = [], width // heads
            for head in (slice(h * d, (h + 1) * d) for h in range(heads)):
                powers = [math.exp(float(query[head] @ key[head]) / math.sqrt(d)) for key in keys]
                found.append(sum(p / sum(powers) * value[head]
                                 for p, value in zip(powers, values, strict=True)))
            found = w["attention.out_proj.weight"] @ torch.cat(found) + w["attention.out_proj.bias"]
            mean = sum(features[r * side + c] for r, c in cell) / len(cell)
            tokens.append(mean + w["out.weight"] @ found + w["out.bias"])
    return torch.stack(tokens).float()
