"""MINT: attend to a few key image tokens only, and contrast the result with the ordinary answer.

    key set = the top keep · N by the attention of the last query position in the first `n_sel` layers
    z = (1 + alpha) · z_key - alpha · z_full        without the tokens y whose p_ref(y) < beta · max p_ref

Wang et al., "MINT", arXiv 2502.00717. Code is not published and we had no formulas: this is a reconstruction,
and its results are not those of the paper. It saves nothing, because every prompt is read twice.
See docs/PAPERS.md.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, each_image
from model.llama_vision import LlamaVision
from model.sampling import limits_of
from pruning.attention import attention_received, every_image
from pruning.options import check_least
from pruning.pruner import Pruner
from pruning.select import num_kept, top_k_mask


@dataclass
class MINT(Pruner):
    """Keeps what the last query position attends to, and contrasts with a second reading of the whole image.

    `n_sel` layers choose, and attend to all tokens; with `beta` 0 every token of the vocabulary is plausible.
    """
    keep: float | int = 0.2
    alpha: float = 1.0
    beta: float = 0.1
    n_sel: int = 1
    update: Literal["step", "prefill"] = "step"         # when the key set is chosen
    ref: Literal["full", "key"] = "full"                # the branch that says which tokens are plausible
    paper = "Wang et al. 2025, arXiv 2502.00717"
    differ = None                                       # [B, 1] whether the branches see different tokens

    def __post_init__(self):
        super().__post_init__()
        check_least(self, alpha=0, beta=0, n_sel=1)
        if self.beta > 1:
            raise ValueError(f"mint: beta is {self.beta}, but must be at most 1")

    def begin(self, model: LlamaVision):
        if self.differ is None:
            raise ValueError("mint reads every prompt twice: call pruner.around(generate), not generate")

    def around(self, generate: Callable) -> Callable:
        """`generate` on a batch of twice the size: first the key branches, then the full ones."""
        def both(model, prompts, image, max_new_tokens, stop_ids, sample, emit, pruner, decode):
            B = len(prompts)
            if image is not None:
                self.differ = self.key_set_is_smaller(image)
            if image is None or not self.differ.any():          # then one reading is enough
                return generate(model, prompts, image, max_new_tokens, stop_ids, sample, emit, pruner, decode)
            ended = [None] * B                                  # what `emit` said last

            def emit_once(b: int, token: int) -> bool | None:
                if b < B:
                    ended[b] = emit(b, token)
                return ended[b % B]
            limits = limits_of(max_new_tokens, B) * 2
            answer = generate(model, prompts * 2, image.select([*range(B)] * 2), limits, stop_ids,
                              lambda logits: sample(logits[:B]).repeat(2), emit_once, pruner, decode)
            return answer.first(B)
        return both

    def key_set_is_smaller(self, image: ImageTokens) -> Tensor:
        """Whether the branches of a sequence see different tokens, [B, 1]."""
        sizes = torch.stack([there.sum(-1) for there in each_image(image)])             # [I, B]
        return (num_kept(self.keep, sizes) < sizes).any(0)[:, None]

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i >= self.n_sel:         # masked, not dropped: a later token may choose what this one did not
            return image, kv if self.update == "prefill" else only(kv, self.kept)
        received = attention_received(queries, kv, "last", per="layer")
        self.received = received + self.received if i else received
        if i == self.n_sel - 1:
            self.kept = self.key_set(self.received, image)
            image = image.take(self.kept) if self.update == "prefill" else image
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        layers = len(image_kv)
        if self.n_sel > layers:
            raise ValueError(f"mint: n_sel is {self.n_sel}, but must be 1 to {layers}: so many layers look")
        self.differ = self.differ & (self.n_sel < layers)               # or no layer is left to mask
        # The first layer is never masked by us: its mask is what the last query position sees.
        self.stored = [replace(kv, mask=image_kv[0].mask) for kv in image_kv] if self.update == "step" else []
        return image_kv

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        if self.update == "prefill":
            return image_kv
        received = sum(attention_received(every_image(queries[i]), self.stored[i], per="layer")
                       for i in range(self.n_sel))
        kept = self.key_set(received, self.stored[0])
        return image_kv[:self.n_sel] + [only(kv, kept) for kv in self.stored[self.n_sel:]]

    def key_set(self, received: Tensor, tokens: ImageTokens | ImageKV) -> Tensor:
        """What each branch sees [2B, N]: the key branch the key set, the full branch everything."""
        kept = top_k_mask(received, self.keep, tokens)
        kept[len(kept) // 2:] = True
        return kept

    def logits(self, logits: Tensor) -> Tensor:
        """[2B, V] of both branches -> the contrast of the two, for both of them."""
        if len(logits) == len(self.differ):         # one reading
            return logits
        key, full = logits.chunk(2)
        p = (full if self.ref == "full" else key).softmax(-1)
        implausible = p < self.beta * p.amax(-1, keepdim=True)
        # The lowest finite number: its probability is 0, as that of -inf, but the logits stay finite.
        lowest = torch.finfo(key.dtype).min
        contrast = (key + self.alpha * (key - full)).masked_fill(implausible, lowest)
        mixed = torch.where(self.differ & (key != full).any(-1, keepdim=True), contrast, full)
        return torch.cat((mixed, mixed))


def only(kv: ImageKV, kept: Tensor) -> ImageKV:
    """The same tokens, all masked but those `kept` [B, N]."""
    return replace(kv, mask=kept[:, None] if kv.mask is None else kept[:, None] & kv.mask)
