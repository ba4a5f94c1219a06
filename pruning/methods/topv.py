"""TopV: keep the image tokens that give most to what an attention layer makes of the image.

Cheng Yang, Yang Sui, Jinqi Xiao, Lingyi Huang, Yu Gong, Chendi Li, Jinghua Yan, Yu Bai, Ponnuswamy
Sadayappan, Xia Hu, Bo Yuan: "TopV: Compatible Token Pruning with Inference Time Optimization for Fast and
Low-Memory Multimodal Vision Language Model", CVPR 2025, arXiv 2503.18278.

The idea: an image token before a layer is a source, the same token after the layer's attention and the norm
that follows is a target, and what each source gives to each target is a problem of optimal transport. The
sources that give most are kept; of the dropped ones every few are put back, so that no region goes blank.

    cost_ij = alpha · |s_i - t_j|² + beta · (1 - exp(-|p_i - p_j|² / 2 sigma²)) + gamma · |p_i - centre|
    P       = `transport` of that, with entropy epsilon;  importance of i = sum over j of P_ij

p is where a patch is in the image, in patches; each of the three terms is first stretched to 0 .. 1. No
attention weights, no prompt and no second model are needed, and nothing is done after the encoder.

The paper's: the pair of source and target, the three terms, three Sinkhorn iterations, putting back.

Could not be carried over: they choose in layer 2 of the decoder, but images have no layers in this one. The
last global layer of the vision encoder stands in for it: a block of the same build, and nothing of the
question is lost, for in their models too the image comes before it. No other layer is offered.

Ours: `keep` is what is left in the end, class tokens and those put back included, so that methods compare.
Theirs is what is chosen: their half, with every fourth of the rest put back, is 0.625 here. Class tokens are
no part of the transport and are kept, but where `keep` is very small never more than the patches: the last
tiles' go first. Where putting back would leave no room to choose any (with every fourth: at a quarter and
less; a little above it hardly any are chosen), nothing is put back: set a larger `stride` for both. Of equal
patches the first win, row by row of the image. With "tile" each tile is a problem of its own with an equal
share, what is over going to the first; the centre is the image's all the same. `sigma` is for 24 x 24
patches and grows with the root of their number: 16.7 for a tile of 40 x 40.

Unverified, for no code is published and we know the abstract, a figure's caption and what others write about
it: all default values but the iterations, the squares, the stretching, the sum as importance, and what the
transport has to satisfy. It cannot be that each source has to give a fixed amount and each target to get one
("balanced"): the fixed amount would be the importance, whatever the cost, and all that ranks is how far three
iterations are from it. "one_sided" fixes what targets get alone; "partial", our default, is halfway.

It takes about six fp32 matrices of patches x patches at a time: 1 GB for the 6400 patches of four tiles, 60
MB for the 1600 of one. Images are solved one after the other, for every prompt anew.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageTokens
from pruning.options import check_least
from pruning.pruner import Pruner
from pruning.select import num_kept

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
