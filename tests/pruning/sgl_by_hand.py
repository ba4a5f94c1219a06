"""SGL's formulas (arXiv 2412.03324 and its code) in loops, and small and large random networks for them."""
import math

import torch
from helpers import CROSS, SHARES, I, random_tiles, small_network
from loops import received_by_hand, watched

from generate import generate, no_one
from model.answer import Answer
from model.image_tokens import Grid, ImageTokens, visible_images
from model.llama_vision import LlamaVision
from model.sampling import GREEDY
from pruning.methods.sgl import SGL, Cascade

PROMPT, GRIDS = [5, 6, I, 7, 8, 9], [(1, 2)]
BATCH = [PROMPT, [12, 13, 14], [I, 5, 15, I, 16, 17], [4, 19, I, I, 20]]
TILES = [[(1, 2)], [], [(1, 1), (2, 1)], [(1, 1), (1, 1)]]          # of the images of each prompt
SEEDS = range(3)
GUIDES = 22, 34, 33         # seeds of small networks whose answers are not one token over and over


def networks(seed: int) -> tuple[LlamaVision, LlamaVision]:
    """A large and a small one."""
    return (small_network(seed, SHARES[seed], CROSS[seed]),
            small_network(GUIDES[seed], SHARES[seed - 1], CROSS[seed - 1]))


def show(network: LlamaVision, sequences: list[list[Grid]], seed: int = 0) -> ImageTokens:
    """Encoded random images of these grids, of each sequence, with the encoder's states."""
    tiles = [random_tiles(grids, network.config.vision, 10 * seed + b) if grids else None
             for b, grids in enumerate(sequences)]
    return network.encode(tiles, keep_states=True)


def asked(pruner: SGL, image: ImageTokens, prompts: list[list[int]] = (PROMPT,), new: int = 4,
          stop: tuple[int, ...] = ()):
    """The small model alone: its scores, answers and confidence are left in the pruner."""
    Cascade(pruner, generate).ask_guide(list(prompts), image, [new] * len(prompts), stop)


def answered(pruner: SGL, network: LlamaVision, prompts: list[list[int]], image: ImageTokens,
             new: int) -> Answer:
    """What both models answer, greedily, with at most `new` tokens."""
    return pruner.around(generate)(network, prompts, image, new, (), GREEDY, no_one, pruner, None)


def attended(network: LlamaVision, ids: list[int], image: ImageTokens, gated: bool = False
             ) -> tuple[list[float], int]:
    """How much attention each image token of one sequence gets, in one pass over its text without a cache.

    The sum over layers, query heads and positions that see it; and how many softmaxes these are."""
    _, q, k = watched(network, lambda: network.hidden(torch.tensor([ids]), image))
    seen = visible_images(torch.tensor([ids]), I)[0].tolist()
    images = image.coords[0, :, 0].tolist()
    sees = {t: [j for j, i in enumerate(images) if i in range(*own)] for t, own in enumerate(seen)}
    sees = {t: tokens for t, tokens in sees.items() if tokens}
    score = [0.0] * len(images)
    for i, layer in enumerate(network.language_model.cross_layers):
        weight = abs(math.tanh(layer.cross_attn_attn_gate.item())) if gated else 1.0
        received, = received_by_hand(q[i][0], k[i][0], sees)
        score = [s + weight * len(q[i][0]) * r for s, r in zip(score, received, strict=True)]
    return score, len(q) * len(q[0][0]) * len(sees)


def words(network: LlamaVision, prompt: list[int], image: ImageTokens, new: int,
          stop: tuple[int, ...] = ()) -> list[int]:
    """The greedy answer of a network, with its stop token: one pass over all the text for each token."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(network.read(torch.tensor([ids]), image)[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


def chances(network: LlamaVision, prompt: list[int], answer: list[int], image: ImageTokens) -> list[float]:
    """The chance of each token of an answer after those before it, each in a pass of its own."""
    p = []
    for i, token in enumerate(answer):
        logits = network.read(torch.tensor([prompt + answer[:i]]), image)[0, -1].tolist()
        p.append(math.exp(logits[token]) / sum(math.exp(logit) for logit in logits))
    return p
