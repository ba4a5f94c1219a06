"""SGL: a small model answers first; what it looked at while doing so is what the large one keeps.

Wangbo Zhao, Yizeng Han, Jiasheng Tang, Zhikai Li, Yibing Song, Kai Wang, Zhangyang Wang, Yang You: "A Stitch
in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating Large VLMs", CVPR 2025, arXiv 2412.03324.
Read were the abstract, what others wrote of it, and the authors' code (NUS-HPC-AI-Lab/SGL).

Theirs, pruning: with a[j, k][q, i] the attention of layer j, head k, text row q to image token i in the small
model, a token's score is a plain sum over everything, rows of the prompt and of the answer alike,

    A_i = sum_j sum_k sum_q a[j, k][q, i];      the later layers of the large model keep the highest.

Theirs, leaving early: over the n tokens of the small model's greedy answer, the one that stops it among them,

    S_conf = (prod_t p_t) ^ (1/n)               p_t as the small model found it, with the whole image
    S_cons = prod_t p'_t                        p'_t read once more, with the top 5 % by its own scores alone
    S      = (S_conf + S_cons) / 2              the small answer is returned where S > threshold.

No threshold is published, and their code applies none: it runs both models and writes S down. `threshold`
None never leaves early, and spares the second reading; 1 never leaves early either, but S can be read off.

What cannot carry over: here image tokens share no softmax with text, so each layer, head and row has the same
mass to give, where theirs counts a layer by how much it looks at the image. `layer_weight="gate"`, ours,
weighs layers by |tanh| of their gates. The saving is keys and values alone: unless answers leave early, the
small model's run is likely to cost more time than they save. 11B for 90B is the pair to think of; nobody has
measured it.

Ours: layers are cross-attention layers, so that their 0.4 of the layers is `full_layers` 3 of the 8 of 11B;
each image has its own top tokens; each row of a batch ends by itself, and one without an image never leaves
early; the small answer is greedy, whatever sampler the large model has. Rows count from the `<|image|>` token
on, and class tokens rank like others. A `guide` that is the model itself is their oracle. Not built: scores
of the prompt alone, of the answer alone or of some layers, and class tokens that are always kept.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from model.config import EXTRA_EMBEDDINGS, Config, padding_id
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.llama_vision import LlamaVision
from pruning.attention import attention_received
from pruning.pruner import Prompts, Pruner, SelectOnce, top_k_mask
from weights import load_model


@dataclass
class SGL(SelectOnce):
    """Keeps what a small model looked at while it answered; may return that answer instead.

    Of the last prompts with an image among them, by row: `guide_answers` are the small model's tokens, and
    where there is a threshold, `confidence` is S. Text alone has an empty answer and None.
    """
    keep: float | int = 0.4
    early_caches: Literal["trim", "full"] = "full"
    guide: str = "guide"                    # as for a model: a bundled one, a folder or a hub id
    threshold: float | None = None          # of S; above it the small model's answer is returned
    consistency: float | int = 0.05         # what the small model keeps when it reads its answer once more
    layer_weight: Literal["none", "gate"] = "none"

    name, paper = "sgl", "Zhao et al. 2025, arXiv 2412.03324"
    needs = ("vision",)                     # its tiles, which the small model encodes for itself

    def __post_init__(self):
        super().__post_init__()
        self.check_share("consistency")

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and self.threshold is None

    @property
    def before_the_first_layer(self) -> bool:
        """Whether no layer reads the whole image; then none makes keys and values of it either."""
        return self.full_layers == 0 and self.when == "prefill"

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        tiles = image.vision.tiles
        guide = load_guide(self.guide, image.features.device, image.features.dtype)
        if wrong := misfit(guide.config, image, prompts):
            raise ValueError(f"{self.name}: guide {self.guide!r} does not fit the model: {wrong}")
        one = all(row is tiles[0] for row in tiles)             # one image, for any number of questions
        seen = guide.encode(tiles[:1]).expand(len(tiles)) if one else guide.encode(tiles)
        watch = Watch(self.layer_weight == "gate")
        answers, logs = answer(guide, prompts, seen, watch)
        self.guide_answers = [[t for t in row if t not in prompts.stop_ids] for row in answers]
        self.confidence = [None] * len(answers)
        if self.threshold is not None:
            fewer = seen.take(top_k_mask(watch.scores, self.consistency, seen))
            again = read_again(guide, prompts.ids, answers, fewer)
            self.confidence = [confidence(p, q) if len(p) else None for p, q in zip(logs, again, strict=True)]
        self.scores = watch.scores[[row for row in range(len(answers)) if row not in self.answered()]]
        return image.take(top_k_mask(watch.scores, self.keep, image)) if self.before_the_first_layer else image

    def answered(self) -> dict[int, list[int]]:
        return {row: self.guide_answers[row] for row, sure in enumerate(self.confidence)
                if sure is not None and sure > self.threshold}

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        return (image, kv) if self.before_the_first_layer else super().layer(i, queries, image, kv)

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        return top_k_mask(self.scores, self.keep, image)


class Watch(Pruner):
    """Lets the small model be; sums in `scores` [B, N] how much each image token is looked at."""

    def __init__(self, gated: bool):
        self.gated, self.weights, self.kvs, self.scores = gated, [], [], 0

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        self.weights.append(queries.gate.float().abs() if self.gated else 1)
        self._add(i, queries, kv)
        return image, kv

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        self.kvs = kvs              # with all N tokens; what decoding holds may have fewer, in other places
        return kvs

    def step(self, queries: list[Tensor], running: list[int]):
        """One more token of the answers that are `running`; they see all that is not masked."""
        for i, (q, kv) in enumerate(zip(queries, self.kvs, strict=True)):
            seen = kv.coords.new_zeros(len(q), 1, 2)
            seen[running, 0, 1] = kv.coords[..., 0].max() + 1
            self._add(i, Queries(q, seen), kv)

    def _add(self, i: int, queries: Queries, kv: ImageKV):
        self.scores = self.scores + self.weights[i] * attention_received(queries, kv).sum(1)


def answer(guide: LlamaVision, prompts: Prompts, image: ImageTokens,
           watch: Watch) -> tuple[list[list[int]], list[Tensor]]:
    """The greedy answer to each prompt about an image, with its stop token, and log p [n] of its tokens."""
    logits, cache = guide.prefill(padded(guide, prompts.ids), list(map(len, prompts.ids)), image,
                                  prompts.max_new_tokens, watch)
    running = (image.coords[..., 0] >= 0).any(1).nonzero()[:, 0].tolist()
    answers, logs = [[] for _ in prompts.ids], [[] for _ in prompts.ids]
    for step in range(prompts.max_new_tokens):
        tokens = logits.argmax(-1)
        new, log = tokens.tolist(), log_chances(logits, tokens).tolist()
        for row in running:
            answers[row].append(new[row])
            logs[row].append(log[row])
        running = [row for row in running if new[row] not in prompts.stop_ids]
        if not running or step + 1 == prompts.max_new_tokens:
            break                                           # the last token is fed to nobody
        logits = guide.decode(tokens, cache)                # ended rows run along, unheard
        watch.step(cache.queries, running)
    return answers, list(map(torch.tensor, logs))


def read_again(guide: LlamaVision, prompts: list[list[int]], answers: list[list[int]],
               image: ImageTokens) -> list[Tensor]:
    """log p [n] of the tokens of answers that are given, each after those before it."""
    hidden = guide.hidden(padded(guide, [p + a for p, a in zip(prompts, answers, strict=True)]), image)
    logs = []
    for states, prompt, given in zip(hidden, prompts, answers, strict=True):
        first = len(prompt) - 1                             # the row that a first token comes of
        tokens = torch.tensor(given, dtype=torch.long, device=hidden.device)
        logs.append(log_chances(guide.lm_head(states[first:first + len(given)]), tokens).cpu())
    return logs


def log_chances(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p [n] of tokens [n], from logits [n, V], in fp32."""
    return logits.float().log_softmax(-1).take_along_dim(tokens[:, None], 1)[:, 0]


def confidence(found: Tensor, again: Tensor) -> float:
    """S, from log p [n] of the tokens of an answer as they were found and as they were read once more."""
    return (found.mean().exp() + again.sum().exp()).item() / 2


def padded(guide: LlamaVision, rows: list[list[int]]) -> Tensor:
    """Token ids of several lengths as one tensor [B, T]."""
    longest, pad = max(map(len, rows)), padding_id(guide.config)
    filled = [row + [pad] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, device=guide.lm_head.weight.device)


def misfit(guide: Config, image: ImageTokens, prompts: Prompts) -> str:
    """What a guide reads otherwise than the model whose tiles, image tokens and prompts these are, or ""."""
    held, own, text = [row for row in image.vision.tiles if row is not None], guide.vision, guide.text
    tiles = sum(int(row.real.sum()) for row in held)
    most, side = next((row.pixels.shape[1], row.pixels.shape[-1]) for row in held if len(row))
    for what, its, ours in (
            ("pixels along a tile", own.image_size, side),
            ("tiles an image at most", own.max_num_tiles, most),
            ("image tokens a tile", own.tokens_per_tile, int((image.coords[..., 0] >= 0).sum()) // tiles),
            ("images in the prompts", sum(ids.count(guide.image_token_index) for ids in prompts.ids),
             sum(map(len, held)))):
        if its != ours:
            return f"it finds {its} {what}, the model {ours}"
    for rows, columns in (grid for row in held for grid in row.grid.tolist()):
        if (rows, columns) not in own.supported_aspect_ratios:
            return f"it knows no {rows} x {columns} tiles"
    if (highest := max(map(max, prompts.ids))) >= (known := text.vocab_size + EXTRA_EMBEDDINGS):
        return f"it knows {known} tokens, but token {highest} is in a prompt"
    if (longest := max(map(len, prompts.ids)) + prompts.max_new_tokens) > text.max_position_embeddings:
        return f"its context holds {text.max_position_embeddings} tokens, but {longest} are asked for"
    return ""


@lru_cache(maxsize=2)
def load_guide(source: str, device: torch.device, dtype: torch.dtype) -> LlamaVision:
    """The small model; the last two are kept for the next question."""
    return load_model(source, device, dtype)
