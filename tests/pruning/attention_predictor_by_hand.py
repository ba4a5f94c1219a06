"""AttentionPredictor's definition (arXiv 2502.04077 and its code) in loops: blocks, history, what is read."""
import math

import torch
from loops import half_up, softmax
from torch import Tensor

from pruning.methods.attention_predictor import AttentionPredictor, Network

Place = tuple[int, ...]                         # image, tile, row, column


def attention(q: Tensor, keys: Tensor, tokens: list[int]) -> dict[int, float]:
    """Attention weights of a query [d] on some tokens of keys [N, d]."""
    weights = softmax(q.double().tolist(), keys[tokens].double().tolist())
    return dict(zip(tokens, weights, strict=True))


def cut(where: list[Place], block: int, layout: str) -> list[list[int]]:
    """The blocks: tile after tile, which tokens are in each."""
    found: dict[tuple, list[int]] = {}
    side, edge = max(p[3] for p in where) + 1, math.isqrt(block)
    for i, (image, tile, y, x) in enumerate(where):
        if y >= 0:
            part = ((y * side + x) // block,) if layout == "raster" else (y // edge, x // edge)
            found.setdefault((image, tile, *part), []).append(i)
    return [found[name] for name in sorted(found)]


def pooled(weights: dict[int, float], blocks: list[list[int]]) -> list[float]:
    return [max((weights.get(i, 0.0) for i in block), default=0.0) for block in blocks]


def budget(expected: list[float], where: list[Place], blocks: list[list[int]],
           keep: float | int) -> list[int]:
    """What is read when this is predicted: of each image its class tokens, then its best blocks."""
    read = []
    for image in sorted({p[0] for p in where}):
        tokens = [i for i, p in enumerate(where) if p[0] == image]
        room = half_up(keep, len(tokens))
        read += [i for i in tokens if where[i][2] < 0][:room]
        room -= sum(where[i][2] < 0 for i in tokens)
        ours = [j for j, block in enumerate(blocks) if block[0] in tokens]
        for j in sorted(ours, key=lambda j: (-expected[j], j)):
            if (room := room - len(blocks[j])) < 0:
                break
            read += blocks[j]
    return sorted(read)


def by_hand(network: Network, rows: list[list[float]]) -> list[float]:
    """The network's formula on one history, tap by tap."""
    x = torch.tensor([rows])                                                            # [channels, h, n]
    for layer in network.first, network.second:
        (_, h, n), wide = x.shape, torch.nn.functional.pad(x, (1, 1, 1, 1))
        y = layer.bias[:, None].repeat(1, h * n)
        for dt in range(3):
            for dj in range(3):
                y += layer.weight[:, :, dt, dj] @ wide[:, dt:dt + h, dj:dj + n].flatten(1)
        x = y.clamp(min=0).view(-1, h, n)
    return (network.mix.weight[0, :, 0] @ (x.sum(1) / x.shape[1]) + network.mix.bias).tolist()


def definition(pruner: AttentionPredictor, q: list[Tensor], keys: Tensor, where: list[Place],
               steps: int) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """Of one layer: what each key/value head reads in every step, and the histories of the query heads."""
    heads, share = len(q[0]), len(q[0]) // len(keys)
    everything, blocks = list(range(len(where))), cut(where, pruner.block, pruner.layout)
    history = [[pooled(attention(own, keys[h // share], everything), blocks) for own in q[0][h]]
               for h in range(heads)]
    history = [rows[-pruner.window:] for rows in history]
    read = []
    for step in range(steps):
        guess = [rows[-1] if pruner.predictor == "last" else
                 [sum(column) / len(rows) for column in zip(*rows, strict=True)]
                 if pruner.predictor == "mean" else by_hand(pruner.network, rows) for rows in history]
        read.append([])
        for g in range(len(keys)):
            mean = [sum(values) / share for values in zip(*guess[g * share:(g + 1) * share], strict=True)]
            read[-1].append(budget(mean, where, blocks, pruner.keep))
        if step + 1 < steps:
            for h in range(heads):
                whole = (step + 1) % pruner.calibrate == 0
                tokens = everything if whole else read[-1][h // share]
                newest = attention(q[step + 1][h, 0], keys[h // share], tokens)
                history[h] = [*history[h], pooled(newest, blocks)][-pruner.window:]
    return read, history
