"""Recorder: a pruner around another one, which acts exactly as that one does, and remembers.

It needs no hook and no change anywhere else: the hooks bring everything that a map of what was kept, or of
where the prompt looks, is drawn from (`pruning/image.py`). n image tokens, N with padding.
"""
from PIL import Image
from torch import Tensor

from model.cache import TextKV
from model.image_tokens import ImageKV, ImageTokens, Queries, Tiles
from pruning.attention import attention_received
from pruning.pruner import Prompts, Pruner
from weights.images import ImageProcessor


class Recorder(Pruner):
    """Does what the pruner inside does, and remembers of batch row 0 what the maps need.

    `tiles` are what the encoder read, None where hook 0 was not called; `image` the tokens that entered
    hook 1, `kvs` what every layer holds after prefill; with `attention`, `mass` has for every layer the
    attention on each image token [n], and its place [n, 4]. Features, keys and values are cut to width 0:
    nothing is held that decoding has let go. A new answer begins anew.
    """

    def __init__(self, inner: Pruner, attention: bool = False):
        self.inner = Pruner() if inner.keeps_all else inner
        self.keep, self.attention, self.words = inner.keep, attention, str(inner)
        self.tiles: Tiles | None = None
        self.image: ImageTokens | None = None
        self.kvs: list[ImageKV] = []
        self.mass: list[tuple[Tensor, Tensor]] = []

    @property
    def keeps_all(self) -> bool:
        """False: its hooks are to be called."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        return self.inner.needs

    @property
    def merges(self) -> bool:
        return self.inner.merges

    @property
    def whole(self) -> list[ImageKV]:
        return self.inner.whole

    def __str__(self) -> str:
        return self.words

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        self.tiles = self.inner.preprocess(images, processor)
        return self.tiles

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        mask = None if image.mask is None else image.mask[:1].cpu()
        self.image = ImageTokens(image.features.new_empty(1, image.features.shape[1], 0).cpu(),
                                 image.coords[:1].cpu(), mask)
        self.kvs, self.mass = [], []
        return self.inner.encoded(image, prompts)

    def answered(self) -> dict[int, list[int]]:
        return self.inner.answered()

    def text_layer(self, i: int, q: Tensor, key: Tensor, lengths: Tensor):
        self.inner.text_layer(i, q, key, lengths)

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if self.attention:
            one = ImageKV(kv.key[:1], kv.value[:1], kv.coords[:1], None if kv.mask is None else kv.mask[:1])
            mass = attention_received(Queries(queries.q[:1], queries.seen[:1]), one, heads="layer")[0]
            there = slice(None) if one.mask is None else one.mask[0, 0]
            self.mass.append((mass[there].cpu(), one.coords[0, 0, there].cpu()))
        return self.inner.layer(i, queries, image, kv)

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        kvs = self.inner.prefilled(kvs)
        nothing = [kv.key.new_empty(1, *kv.key.shape[1:3], 0).cpu() for kv in kvs]
        self.kvs = [ImageKV(empty, empty, kv.coords[:1].cpu(), None if kv.mask is None else kv.mask[:1].cpu())
                    for empty, kv in zip(nothing, kvs, strict=True)]
        return kvs

    def stepped(self, step: int, queries: list[Tensor], kvs: list[ImageKV]) -> list[ImageKV]:
        return self.inner.stepped(step, queries, kvs)

    def text_cache(self, step: int, texts: list[TextKV]) -> list[TextKV]:
        return self.inner.text_cache(step, texts)

    def logits(self, logits: Tensor) -> Tensor:
        return self.inner.logits(logits)
