"""Every n-th image token, whatever the question: the second baseline of the Trimmed Llama paper.

The paper keeps every other one; here any ratio, as evenly spaced as whole numbers allow. See docs/PAPERS.md.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, each_image
from pruning.pruner import SelectOnce
from pruning.select import evenly_spaced, num_kept


@dataclass
class Spatial(SelectOnce):
    """Keeps every n-th token."""
    paper = "Lee et al. 2025, arXiv 2504.00557, Table 3"

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        kept = torch.zeros(image.coords.shape[:2], dtype=torch.bool, device=image.coords.device)
        for there in each_image(image):
            tokens = there.sum(-1, keepdim=True)
            rank = there.cumsum(-1) - 1
            n = num_kept(self.keep, tokens)
            kept |= there & evenly_spaced(rank, n, tokens.clamp(min=1))
        return kept
