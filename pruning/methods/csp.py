"""CSP, Cross-Self Pruning: rank what is seen within a modality apart from what is seen across two.

Scores of text on text and of text on image differ in scale, and a joint ranking starves one of them. So each
has its own: the sum, over the last rows of the prompt, of a softmax with n added to its denominator.

Xiaohuan Pei, Tao Huang, Chang Xu: "Cross-Self KV Cache Pruning for Efficient Vision-Language Inference",
arXiv 2412.04652. Read against the authors' code (TerryPei/CSP).

    A[t, j] = exp o[t, j] / (n + sum over i of exp o[t, i])         S[g, j] = sum of A over the last rows
                                                                    and its mean over the query heads of g
n is a key with score ln n and no value. It says nothing of the order in one row; a row with weak evidence for
all its keys counts less. Ranking alone uses it; the model reads, and decodes, with its own softmax.

Theirs: n = 1; a set for each key/value head is the code's (its models have one for each query head),
`heads="layer"`, one set by the mean over all heads, is the paper's; a fifth of the prompt is kept. The last
rows are a tenth of all tokens, text and image: with images of ordinary size that is every row that sees one,
as an image has far more tokens than its question.

Does not carry over: the trade-off between the two modalities in one cache, which is what the method is about.
Here text and image are in different caches anyway, and nothing from image to text or image to image is left
in the decoder. So the authors' share of cross attention and their coupled budgets are not built: `keep` is of
the image, `text_keep` of the text, 1 for all of it. What is left with all text kept is a ranking by the
last rows for each key/value head. Below 1 it is pruned likewise: causal, and the last `recent` of the prompt
always kept, within `text_keep` (theirs: a tenth times a factor tuned for each data set).

Ours: rows that see no image have no say on it; the last rows are counted among those that see one. `decode_n`
above 0 is what the paper argues for and its code lacks: n also in the softmax of decoding, as one more entry
of each image cache, key and value 0, at row and column -2. It is counted as a token held. Not verified: none
of the defaults is tuned to this architecture, and results here say little of CSP elsewhere.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_received
from pruning.options import check_least, check_share
from pruning.pruner import SelectPerLayer
from pruning.select import num_kept


@dataclass
class CSP(SelectPerLayer):
    """Keeps what the last query positions attend to; those with more evidence count more. Each key/value head
    has a set of its own.

    `observed` are the last query positions: a share of all tokens, text and image, or a number.
    """
    keep: float | int = 0.2
    observed: float | int = 0.1
    n: float = 1.0
    per: Literal["kv_head", "layer"] = "kv_head"
    decode_n: float = 0.0

    name, paper = "csp", "Pei et al. 2024, arXiv 2412.04652"

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "observed")
        check_least(self, n=0, decode_n=0)

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and not self.decode_n

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        real = torch.ones_like(image.coords[..., 0]) if image.mask is None else image.mask
        text = torch.tensor([len(ids) for ids in prompts], device=real.device)
        self.asking = num_kept(self.observed, real.sum(1) + text)                       # [B]
        return image

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        sees = queries.seen[..., 0] < queries.seen[..., 1]                              # [B, T]
        from_the_end = sees.flip(1).cumsum(1).flip(1)
        last = sees & (from_the_end <= self.asking[:, None])
        return attention_received(queries, kv, last, self.per, partial(nsoftmax, n=self.n))

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        image_kv = super().prefilled(image_kv)
        return [with_null_key(kv, self.decode_n) for kv in image_kv] if self.decode_n else image_kv


def nsoftmax(scores: Tensor, n: float) -> Tensor:
    """exp scores / (n + their sum), over the last dimension."""
    return F.pad(scores, (0, 1), value=math.log(n)).softmax(-1)[..., :-1] if n else scores.softmax(-1)


def with_null_key(kv: ImageKV, n: float) -> ImageKV:
    """With one more entry that adds n to the denominator of a softmax and nothing to what comes of it."""
    coords = torch.cat((kv.coords[:, :, :1, :2], torch.full_like(kv.coords[:, :, :1, 2:], -2)), -1)
    bias = kv.key.new_zeros(kv.coords.shape[:3], dtype=torch.float32)
    return ImageKV(F.pad(kv.key, (0, 0, 0, 1)), F.pad(kv.value, (0, 0, 0, 1)),
                   torch.cat((kv.coords, coords), 2),
                   None if kv.mask is None else F.pad(kv.mask, (0, 1), value=True),
                   F.pad(bias, (0, 1), value=math.log(n)))
