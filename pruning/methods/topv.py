"""TopV: keep the image tokens that give most to what an attention layer makes of the image.

    cost[i, j] = alpha · |s_i - t_j|² + beta · (1 - exp(-|p_i - p_j|² / 2 sigma²)) + gamma · |p_i - centre|
    importance[i] = sum over j of P[i, j], P the plan of optimal transport; every few others are put back

Yang et al., "TopV", CVPR 2025, arXiv 2503.18278; known from its abstract and from notes. s and t are states
before and after attention. Ours: the last global layer of the encoder in place of layer 2 of the decoder, and
what the transport has to satisfy.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageTokens
from pruning.options import check_least
from pruning.pruner import Pruner
from pruning.select import num_kept

MOST_ITERATIONS = 1000
KAPPA = {"one_sided": 0.0, "partial": 0.5, "balanced": 1.0}


@dataclass
class TopV(Pruner):
    """Keeps the patches that give most to the encoder's last attention, and every few of the others."""
    keep: float | int = 0.5
    alpha: float = 1.0                              # weight of features that are unlike the target's
    beta: float = 1.0                               # of the distance from the target
    gamma: float = 0.01                             # of the distance from the centre
    sigma: float = 10.0                             # how far is far, where there are 24 x 24 patches
    epsilon: float = 0.1                            # of the entropy: the higher, the more alike all are
    iterations: int = 3
    mode: Literal["partial", "one_sided", "balanced"] = "partial"
    stride: int = 4                                 # of the dropped, every so manyth is put back; 0: none
    scope: Literal["canvas", "tile"] = "canvas"     # one problem for an image, or one for each tile
    paper = "Yang et al. 2025, arXiv 2503.18278"
    keep_states = True

    def __post_init__(self):
        super().__post_init__()
        check_least(self, alpha=0, beta=0, gamma=0, sigma=0.01, epsilon=0.01, stride=0, iterations=1)
        if self.iterations > MOST_ITERATIONS:
            raise ValueError(f"{self.name}: iterations is {self.iterations}, but must be at most "
                             f"{MOST_ITERATIONS}")

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        kept = torch.zeros_like(image.coords[..., 0], dtype=torch.bool)
        states = image.states
        for b, tiles in enumerate(states.tiles):
            for i, (_, columns) in enumerate([] if tiles is None else tiles.grid.tolist()):
                own = b, image.coords[b, :, 0] == i
                before, after = states.entering[own], states.attended[own]
                kept[own] = self.choose(image.coords[own], columns, before, after)
        return image.take(kept)

    def choose(self, coords: Tensor, columns: int, source: Tensor, target: Tensor) -> Tensor:
        """Which tokens of one image are kept, [n] bool: coords [n, 4] and states [n, E]."""
        tile = coords[:, 1]
        class_token = coords[:, 2] < 0
        n = int(num_kept(self.keep, torch.tensor(len(coords))))
        corner = torch.stack((tile // columns, tile % columns), 1) * (coords[:, 3].max() + 1)
        spot = corner + coords[:, 2:]                                           # row and column in the image
        reading = (spot[:, 0] * (spot.max() + 2) + spot[:, 1]).argsort()        # row by row of the image
        kept = class_token & (class_token.cumsum(0) <= n // 2)
        n -= int(kept.sum())
        parts = [~class_token]
        if self.scope == "tile":
            parts = [~class_token & (tile == t) for t in tile.unique()]
        for i, part in enumerate(parts):
            which = reading[part[reading]]
            cost = self.cost(source[which], target[which], spot[which] - spot.amax(0) / 2)
            gives = transport(cost, KAPPA[self.mode], self.iterations, self.epsilon).sum(1)
            room = (n + len(parts) - 1 - i) // len(parts)
            kept[which[pick(gives, room, self.stride)]] = True
        return kept

    def cost(self, source: Tensor, target: Tensor, spot: Tensor) -> Tensor:
        """States [n, E] and where they are, from the centre [n, 2] -> [n, n] fp32."""
        unlike = torch.cdist(source.float(), target.float()).square()
        off = spot.norm(dim=1, keepdim=True)
        near = (torch.cdist(spot, spot) * 24 / self.sigma).square().div(-2 * len(spot)).exp()
        terms = zip((self.alpha, self.beta, self.gamma), (unlike, 1 - near, off), strict=True)
        return sum(weight * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12) for weight, x in terms)


def transport(cost: Tensor, kappa: float, iterations: int, epsilon: float) -> Tensor:
    """What each source gives to each target, [n, n]: the plan of least cost and most entropy.

    Every target gets 1 / n. What a source gives is free with `kappa` 0, and with 1 fixed to 1 / n as well
    (Sinkhorn's own; a cost that only the source has then makes no difference); between, drawn towards it.
    """
    log_k = cost / -epsilon
    v = 0.0
    for _ in range(iterations):             # a factor that all sources have cancels out: no 1 / n in here
        u = -kappa * (log_k + v).logsumexp(1, keepdim=True)
        v = -(log_k + u).logsumexp(0)
    return (log_k + u + v).exp() / len(cost)


def pick(gives: Tensor, n: int, stride: int) -> Tensor:
    """Which n patches to keep: the best, and every `stride`-th of the others; none of them where there is no
    room."""
    # best + (patches - best) / stride <= n, solved for the best
    best = (stride * n - len(gives)) // (stride - 1) if stride * n - len(gives) >= stride - 1 > 0 else n
    order = gives.argsort(descending=True, stable=True)
    return torch.cat((order[:best], order[best:].sort().values[::max(stride, 1)][:n - best]))
