"""VisionZip: keep what the encoder's class tokens attend to most, and merge the rest into a few tokens.

    dominant   = all class tokens, and the patches that class tokens give the most attention
    contextual = every so manyth of the others, y[i] = (y[i] + mean of y[j]) / 2
                 over the j of the others whose keys are more like the key of i than of any other such token

Yang et al., "VisionZip", CVPR 2025, arXiv 2412.04467. Ours: the encoder's last global layer is asked, all
tiles of an image share a budget, the / 2, and `bias`.
See docs/PAPERS.md.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning.encoder_attention import class_attention
from pruning.merge import merge_tokens
from pruning.options import check_share
from pruning.pruner import Pruner
from pruning.select import each_budget, num_kept


@dataclass
class VisionZip(Pruner):
    """Keeps what the encoder's class tokens attend to most, and merges the rest into a few tokens."""
    keep: float | int = 0.25
    contextual: float | int = 0.15625               # of the tokens that are left: 10 of 64
    bias: bool = False                              # add ln of how many tokens one stands for to its scores
    paper = "Yang et al. 2024, arXiv 2412.04467"
    keep_states = True
    merges = True

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "contextual")

    def begin(self, model: LlamaVision):
        self.encoder_layer = model.vision_model.global_transformer.layers[-1]

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        B, N = image.coords.shape[:2]
        owner = torch.arange(N, device=image.coords.device).repeat(B, 1)
        weight = torch.ones_like(owner, dtype=torch.float32)
        for b, own, left in each_budget(image, self.keep):
            found = self.owner(image.states.entering[b, own], image.coords[b, own, 2] < 0, left)
            owner[b, own] = own[found]
            weight[b, own] = (found.bincount(minlength=len(own)) - 1).clamp(min=1).float()
        self.owners = [owner]
        return merge_tokens(image, owner, weight, self.bias)

    def owner(self, states: Tensor, is_class: Tensor, left: int) -> Tensor:
        """Which token of one image stands for each, [n], if so many are left; states [n, E]."""
        received, key = class_attention(self.encoder_layer, states, is_class,
                                        self.encoder_layer.self_attn.heads)
        key = F.normalize(key.mean(0), dim=-1)                                          # [n, d]
        contextual = int(num_kept(self.contextual, torch.tensor(left)))
        order = received.masked_fill(is_class, torch.inf).argsort(descending=True, stable=True)
        others = order[left - contextual:].sort().values
        targets = others[::len(others) // contextual][:contextual]
        owner = torch.arange(len(states), device=states.device)
        owner[others] = targets[(key[others] @ key[targets].T).argmax(1)]
        owner[targets] = targets
        return owner
