"""MINT: look at a few key image tokens only, and contrast what comes of it with the ordinary answer.

Chao Wang, Jianming Yang, Yang Zhou: "MINT: Mitigating Hallucinations in Large Vision-Language Models via
Token Reduction", arXiv 2502.00717. No code is published; we had the abstract and summaries, no formulas.

Theirs, in words: a small set of key tokens is chosen in shallow layers, the rest is masked in the layers
after them, and decoding contrasts the logits with those of the ordinary model, within a plausibility
constraint. As built, with a_l the attention of one text row in layer l, a mean over heads, and with z and p
the logits and probabilities of a branch:

    key set = the keep · N highest of sum over l < n_sel of a_l
    z = (1 + alpha) · z_key - alpha · z_full, without tokens y that have p_ref(y) < beta · max p_ref

Unverified, and borrowed from like methods: which layers and which row choose, the mean over heads and `keep`
(FastV, MoD), alpha, beta and the reference of the constraint (VCD). That the key branch is the one to be
raised is inferred from the abstract. So this is a reconstruction: its results are not the paper's.

Ours: layers are cross-attention layers, where we choose as where we mask. Both branches are rows of one
batch, each with its own text cache, for their hidden states part at the first masked layer. The last prompt
row chooses (of several images each: the last that sees it), and its set holds for all rows of the prompt; a
mask for the last row alone is not built, nor a choice that spares class tokens. A decoded token's own
attention is known too late for itself: with `update="step"` it reads with the set that the row before it
chose, by the queries of the key branch. With "prefill" the prompt's set stays. Rows whose branches read the
same (text alone, or images kept whole) get the ordinary logits, without the constraint.

This saves nothing: every prompt is read twice, and the full branch keeps all tokens. With "prefill" later
layers drop the other tokens from the key branch, but a batch takes the room of its longest row.
"""
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import each_image
from pruning.attention import attention_received
from pruning.pruner import ImageKV, ImageTokens, Prompts, Pruner, Queries, num_kept, top_k_mask


@dataclass
class MINT(Pruner):
    """Keeps what the last text row attends to, and contrasts with a second reading that keeps everything.

    Of 2B rows the first B are the key branch. `n_sel` layers choose and read the whole image; with `beta` 0
    every token of the vocabulary is plausible.
    """
    keep: float | int = 0.2
    alpha: float = 1.0
    beta: float = 0.1
    n_sel: int = 1
    update: Literal["step", "prefill"] = "step"         # when the key set is chosen
    ref: Literal["full", "key"] = "full"                # the branch that says which tokens are plausible
    paper = "Wang et al. 2025, arXiv 2502.00717"

    def __post_init__(self):
        super().__post_init__()
        rules = {"alpha": (self.alpha >= 0, "at least 0"), "beta": (0 <= self.beta <= 1, "0 to 1"),
                 "n_sel": (self.n_sel >= 1, "at least 1")}
        for option, (good, words) in rules.items():
            if not good:
                raise ValueError(f"mint: {option} is {getattr(self, option)}, but must be {words}")

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        sizes = [there.sum(-1) for there in each_image(image)]
        # [B, 1] Whether the branches see unlike tokens; where no row's do, one reading is enough.
        self.parted = torch.stack([num_kept(self.keep, n) < n for n in sizes]).any(0)[:, None]
        return image.rows([*range(len(self.parted))] * 2) if self.parted.any() else image

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i >= self.n_sel:         # masked, not dropped: a later token may choose what this one did not
            return image, kv if self.update == "prefill" else only(kv, self.kept)
        self.mass = attention_received(queries, kv, "last", heads="layer") + (self.mass if i else 0)
        if i == self.n_sel - 1:
            self.kept = self.key_set(self.mass, image)
            image = image.take(self.kept) if self.update == "prefill" else image
        return image, kv

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        if self.n_sel > len(kvs):
            raise ValueError(f"mint: n_sel is {self.n_sel}, but must be 1 to {len(kvs)}: so many layers look")
        self.parted = self.parted & (self.n_sel < len(kvs))                 # or no layer is left to mask
        # The first layer is never masked: what it has left is what the last row sees.
        self.whole = [replace(kv, mask=kvs[0].mask) for kv in kvs] if self.update == "step" else []
        return kvs

    def stepped(self, step: int, queries: list[Tensor], kvs: list[ImageKV]) -> list[ImageKV]:
        if self.update == "prefill":
            return kvs
        every = torch.tensor([[[0, 2 ** 31]]], device=queries[0].device).expand(len(queries[0]), 1, 2)
        kept = self.key_set(sum(attention_received(Queries(queries[i], every), self.whole[i], heads="layer")
                                for i in range(self.n_sel)), self.whole[0])
        return kvs[:self.n_sel] + [only(kv, kept) for kv in self.whole[self.n_sel:]]

    def key_set(self, mass: Tensor, tokens: ImageTokens | ImageKV) -> Tensor:
        """What each row of both branches sees [2B, N]: the key set, and then everything."""
        kept = top_k_mask(mass, self.keep, tokens)
        kept[len(kept) // 2:] = True
        return kept

    def logits(self, logits: Tensor) -> Tensor:
        key, full = logits[:len(self.parted)], logits[-len(self.parted):]       # the same after one reading
        p = (full if self.ref == "full" else key).softmax(-1)
        # What is not plausible gets the lowest finite number: its probability is 0, as that of -inf.
        mixed = (key + self.alpha * (key - full)).masked_fill(p < self.beta * p.amax(-1, keepdim=True),
                                                              torch.finfo(key.dtype).min)
        return torch.where(self.parted & (key != full).any(-1, keepdim=True), mixed, full)


def only(kv: ImageKV, kept: Tensor) -> ImageKV:
    """All tokens, but none to be seen beside those `kept` [B, N]."""
    return replace(kv, mask=kept[:, None] if kv.mask is None else kept[:, None] & kv.mask)
