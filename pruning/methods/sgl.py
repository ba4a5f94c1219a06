"""SGL: a small model answers first; what it attended to meanwhile is what the large one keeps.

    A[j] = sum of A_l[h, t, j] of the small model over layers l, heads h, positions t of prompt and answer
    S    = (S_conf + S_cons) / 2 of its answer, which is returned instead if S > threshold

Zhao et al., "A Stitch in Time Saves Nine", CVPR 2025, arXiv 2412.03324. Here every layer has the same weight,
because cross-attention always sums to 1; `layer_weight` is ours. No threshold is published.
See docs/PAPERS.md.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from model.config import Config
from model.image_tokens import ImageKV, ImageTokens, Queries, Tiles
from model.llama_vision import LlamaVision
from model.sampling import GREEDY, limits_of
from pruning.attention import attention_received
from pruning.options import check_share
from pruning.pruner import Pruner, SelectOnce
from pruning.select import top_k_mask
from weights import load_model


@dataclass
class SGL(SelectOnce):
    """Keeps what a small model looked at while it answered; may return that answer instead.

    After an answer, by sequence: `guide_answers` are the small model's tokens, `confidence` is S, if there is
    a threshold. Text alone has an empty answer, and None.
    """
    keep: float | int = 0.4
    early_caches: Literal["trim", "full"] = "full"
    guide: str = "guide"                    # as for a model: a bundled one, a folder or a hub id
    threshold: float | None = None          # of S; above it the small model's answer is returned
    consistency: float | int = 0.05         # what the small model keeps when it reads its answer once more
    layer_weight: Literal["none", "gate"] = "none"

    name = "sgl"
    paper = "Zhao et al. 2025, arXiv 2412.03324"
    keep_states = True                      # its tiles, which the small model encodes for itself
    scores = None                           # [B, N] of the guide

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "consistency")

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and self.threshold is None

    @property
    def before_the_first_layer(self) -> bool:
        """Whether no layer attends to all tokens; then no layer makes keys and values of them either."""
        return self.full_layers == 0 and self.when == "prefill"

    def around(self, generate: Callable) -> Callable:
        return Cascade(self, generate)

    def begin(self, model: LlamaVision):
        if self.scores is None:
            raise ValueError("sgl needs its guide's answer first: call pruner.around(generate), not generate")

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        return image.take(top_k_mask(self.scores, self.keep, image)) if self.before_the_first_layer else image

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        return (image, kv) if self.before_the_first_layer else super().layer(i, queries, image, kv)

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        return self.scores


class Cascade:
    """Two models around `generate`: the small one answers, the large one answers what it is not sure of."""

    def __init__(self, sgl: SGL, generate: Callable):
        self.sgl = sgl
        self.generate = generate

    def __call__(self, model, prompts, image, max_new_tokens, stop_ids, sample, emit, pruner, decode):
        """Called like `generate.generate`, and returns such an Answer."""
        sgl = self.sgl
        generate = self.generate
        if image is None or pruner.keeps_all:
            return generate(model, prompts, image, max_new_tokens, stop_ids, sample, emit, pruner, decode)
        limits = limits_of(max_new_tokens, len(prompts))
        guided = self.ask_guide(prompts, image, limits, stop_ids)
        early = [b for b, sure in enumerate(sgl.confidence) if sure is not None and sure > sgl.threshold]
        for b in early:
            any(emit(b, token) is True for token in sgl.guide_answers[b])       # up to where `emit` ends it
        rest = [b for b in range(len(prompts)) if b not in early]
        layers = len(model.language_model.cross_layers)
        answer = replace(guided, tokens=[list(said) for said in sgl.guide_answers], early=early, decoded=0,
                         kept=[[0.0] * layers for _ in prompts], image_kv_bytes=0, image_kv_stored=0,
                         text_kv_bytes=0, ms={"prefill": sum(guided.ms.values()), "decode": 0.0})
        if not rest:
            return answer
        sgl.scores = sgl.scores[rest]

        def sample_rest(logits: Tensor) -> Tensor:      # samplers know sequences by their places
            whole = logits.new_zeros(len(prompts), logits.shape[-1])
            whole[rest] = logits
            return sample(whole)[rest]

        large = generate(model, [prompts[b] for b in rest], image.select(rest),
                         [limits[b] for b in rest], stop_ids, sample_rest,
                         lambda i, token: emit(rest[i], token), pruner, decode)
        for i, b in enumerate(rest):
            answer.tokens[b] = large.tokens[i]
            answer.kept[b] = large.kept[i] or answer.kept[b]        # text alone has no counts
        large.ms["prefill"] += answer.ms["prefill"]
        return replace(large, tokens=answer.tokens, seen=answer.seen, kept=answer.kept, early=early)

    def ask_guide(self, prompts: list[list[int]], image: ImageTokens, limits: list[int],
                  stop_ids: tuple[int, ...]):
        """The small model's Answer to every prompt; leaves scores, answers and confidence in the pruner."""
        sgl = self.sgl
        tiles = image.states.tiles
        guide = load_guide(sgl.guide, image.features.device, image.features.dtype)
        if wrong := misfit(guide.config, tiles, image, prompts, limits):
            raise ValueError(f"{sgl.name}: guide {sgl.guide!r} does not fit the model: {wrong}")
        one = all(each is tiles[0] for each in tiles)           # one image, for any number of questions
        seen = guide.encode(tiles[:1]).expand(len(tiles)) if one else guide.encode(tiles)
        watch = Watch(stop_ids, limits, sgl.layer_weight == "gate", (image.coords[..., 0] >= 0).any(1))
        answer = self.generate(guide, prompts, seen, limits, stop_ids, GREEDY, silent, watch, None)
        sgl.scores = watch.scores
        sgl.guide_answers = [[t for t in said if t not in stop_ids] for said in watch.answers]
        sgl.confidence = [None] * len(prompts)
        if sgl.threshold is not None:
            fewer = seen.take(top_k_mask(watch.scores, sgl.consistency, seen))
            again = read_again(guide, prompts, watch.answers, fewer)
            for b, said in enumerate(watch.answers):
                if said:
                    sgl.confidence[b] = confidence(torch.tensor(watch.log_p[b]), again[b])
        return answer


def silent(sequence: int, token: int):
    """An `emit` that does nothing."""


class Watch(Pruner):
    """Changes nothing in the small model; sums in `scores` [B, N] the attention that image tokens receive
    from prompt and answer. `answers` have their stop tokens, `log_p` the log probability of each of their
    tokens; only sequences that see an image have any."""
    keeps_all = False           # so that its hooks are called

    def __init__(self, stop_ids: tuple[int, ...], limits: list[int], gated: bool, sees_image: Tensor):
        self.stop_ids = stop_ids
        self.limits = torch.tensor(limits, device=sees_image.device)                    # [B]
        self.gated = gated
        self.running = sees_image                                                       # [B]
        self.scores = 0
        self.steps = 0
        self.answers = [[] for _ in sees_image]
        self.log_p = [[] for _ in sees_image]

    def begin(self, model: LlamaVision):
        self.weights = [layer.cross_attn_attn_gate.tanh().float().abs() if self.gated else 1
                        for layer in model.language_model.cross_layers]

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        self.add(i, queries, kv)
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        self.image_kv = image_kv    # with all N tokens: the cache may have fewer, at other indices
        return image_kv

    def logits(self, logits: Tensor) -> Tensor:
        tokens = logits.argmax(-1)
        log_p = log_probability(logits, tokens).tolist()
        for b in self.running.nonzero()[:, 0].tolist():
            self.answers[b].append(int(tokens[b]))
            self.log_p[b].append(log_p[b])
        self.steps += 1
        stopped = torch.isin(tokens, tokens.new_tensor(self.stop_ids)) | (self.steps >= self.limits)
        self.running = self.running & ~stopped
        return logits

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        for i, (q, kv) in enumerate(zip(queries, self.image_kv, strict=True)):
            seen = kv.coords.new_zeros(len(q), 1, 2)
            seen[self.running, 0, 1] = kv.coords[..., 0].max() + 1
            self.add(i, Queries(q, seen), kv)
        return image_kv

    def add(self, i: int, queries: Queries, kv: ImageKV):
        self.scores = self.scores + self.weights[i] * attention_received(queries, kv).sum(1)


def read_again(guide: LlamaVision, prompts: list[list[int]], answers: list[list[int]],
               image: ImageTokens) -> list[Tensor]:
    """The log probability [n] of the tokens of answers that are given, each after those before it."""
    ids, _ = guide.pad_right([prompt + said for prompt, said in zip(prompts, answers, strict=True)])
    hidden = guide.hidden(ids, image)                                                   # [B, T, D]
    log_p = []
    for states, prompt, said in zip(hidden, prompts, answers, strict=True):
        first = len(prompt) - 1                         # the position whose logits give the first token
        tokens = torch.tensor(said, dtype=torch.long, device=hidden.device)
        log_p.append(log_probability(guide.lm_head(states[first:first + len(said)]), tokens).cpu())
    return log_p


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p [n] of tokens [n], from logits [n, V], in fp32."""
    return logits.float().log_softmax(-1).take_along_dim(tokens[:, None], 1)[:, 0]


def confidence(found: Tensor, again: Tensor) -> float:
    """S, from log p [n] of the tokens of an answer as they were found and as they were read once more."""
    return (found.mean().exp() + again.sum().exp()).item() / 2


def misfit(guide: Config, tiles: list[Tiles | None], image: ImageTokens, prompts: list[list[int]],
           limits: list[int]) -> str:
    """What a guide reads otherwise than the model whose tiles, image tokens and prompts these are, or ""."""
    given = [each for each in tiles if each is not None and len(each)]
    vision = guide.vision
    text = guide.text
    real = sum(int(each.real.sum()) for each in given)
    slots = given[0].pixels.shape[1]
    side = given[0].pixels.shape[-1]
    tokens = int((image.coords[..., 0] >= 0).sum()) // real
    named = sum(ids.count(guide.image_token_index) for ids in prompts)
    for what, its, ours in (("pixels along a tile", vision.image_size, side),
                            ("tiles an image at most", vision.max_num_tiles, slots),
                            ("image tokens a tile", vision.tokens_per_tile, tokens),
                            ("images in the prompts", named, sum(map(len, given)))):
        if its != ours:
            return f"it finds {its} {what}, the model {ours}"
    for rows, columns in (grid for each in given for grid in each.grid.tolist()):
        if (rows, columns) not in vision.supported_aspect_ratios:
            return f"it knows no {rows} x {columns} tiles"
    known = text.embedding_rows
    highest = max(map(max, prompts))
    if highest >= known:
        return f"it knows {known} tokens, but token {highest} is in a prompt"
    longest = max(len(ids) + limit for ids, limit in zip(prompts, limits, strict=True))
    if longest > text.max_position_embeddings:
        return f"its context holds {text.max_position_embeddings} tokens, but {longest} are asked for"
    return ""


@lru_cache(maxsize=2)
def load_guide(source: str, device: torch.device, dtype: torch.dtype) -> LlamaVision:
    """The small model; the last two are kept for the next question."""
    return load_model(source, device, dtype)
