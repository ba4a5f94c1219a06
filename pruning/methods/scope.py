"""SCOPE: keep image tokens that the encoder attends to and that cover the others.

    cover(j) = max over the kept tokens k of cos(j, k), at least 0
    gain(i)  = sum over j of max(0, cos(j, i) - cover(j))
    score(i) = gain(i) · saliency(i)^alpha        the highest is kept, one token after the other

Deng et al., "SCOPE", NeurIPS 2025, arXiv 2510.24214. Tokens are the patches of an image, cos is of what the
projector reads, saliency the attention of the class tokens in the encoder's last layer. Ours: the tiles of an
image are one problem. See docs/PAPERS.md.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from model.llama_vision import LlamaVision
from pruning.encoder_attention import class_attention
from pruning.options import check_least
from pruning.pruner import SelectOnce
from pruning.select import each_budget


@dataclass
class Scope(SelectOnce):
    """Keeps tokens that are salient and that cover what is not covered yet."""
    full_layers: int = 0
    alpha: float = 1.0                              # weight of saliency: 0 is coverage alone

    paper = "Deng et al. 2025, arXiv 2510.24214"
    keep_states = True

    def __post_init__(self):
        super().__post_init__()
        check_least(self, alpha=0)

    def begin(self, model: LlamaVision):
        self.attending = model.vision_model.global_transformer.layers[-1]

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        kept = torch.zeros_like(image.coords[..., 0], dtype=torch.bool)
        for b, own, n in each_budget(image, self.keep):
            is_class = image.coords[b, own, 2] < 0
            states = image.states.entering[b, own]
            saliency, _ = class_attention(self.attending, states, is_class, self.attending.self_attn.heads)
            patches = own[~is_class]
            room = max(n - len(patches), 0)                             # class tokens only fill up
            best = cover(image.states.features[b, patches], saliency[~is_class] ** self.alpha, n - room)
            kept[b, torch.cat((patches[best], own[is_class][:room]))] = True
        return kept


def cover(features: Tensor, saliency: Tensor, n: int) -> Tensor:
    """The `n` of the tokens [N, F] that are kept, in the order in which they are chosen."""
    unit = F.normalize(features.float(), dim=-1)
    alike = unit @ unit.T                                                               # [N, N]
    gain = alike.clamp(min=0).sum(0)                                                    # [N]
    covered = torch.zeros_like(gain)
    free = torch.ones_like(gain, dtype=torch.bool)
    chosen = []
    for _ in range(n):
        chosen.append((gain * saliency).masked_fill(~free, -torch.inf).argmax())
        free[chosen[-1]] = False
        better = covered.maximum(alike[chosen[-1]])
        rises = better > covered                    # elsewhere no gain changes
        rows = alike[rises]
        lost = (rows - covered[rises, None]).clamp(min=0) - (rows - better[rises, None]).clamp(min=0)
        gain = gain - lost.sum(0)
        covered = better
    return torch.stack(chosen)
