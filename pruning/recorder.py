"""Recorder: a pruner around another one, which does exactly what that one does, and remembers what it saw.

A map of what was kept or merged, or of what the prompt attends to, is drawn from it
(`pruning/visualize.py`). n image tokens without padding, N with it, K = 1 or G sets of tokens.
"""
from PIL import Image
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, Tiles
from pruning.attention import attention_received
from pruning.pruner import Pruner, Wrapper
from weights.images import ImageProcessor


class Recorder(Wrapper):
    """Remembers, for sequence 0 of the batch, what the maps need; a new answer begins anew.

    `tiles` are what the encoder read last (None if hook 0 was not called): where each conversation has images
    of its own, record one of them. `image` has the tokens before hook 1, `image_kv` what every layer keeps
    after prefill; `clusters` the pruner's `owners`, those of each layer or
    one for all, [K, n]: indices of tokens of `image`, without its padding. With `attention`, `received` has
    for every layer the attention that each image token receives [n] and its coords [n, 4]. Features, keys and
    values are cut to width 0, so that no memory is held which decoding has freed.
    """

    def __init__(self, inner: Pruner, attention: bool = False):
        super().__init__(Pruner() if inner.keeps_all else inner)
        self.attention = attention
        self.words = str(inner)
        self.tiles: Tiles | None = None
        self.image: ImageTokens | None = None
        self.image_kv: list[ImageKV] = []
        self.clusters: list[Tensor] = []
        self.received: list[tuple[Tensor, Tensor]] = []

    def __str__(self) -> str:
        return self.words

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        self.tiles = self.inner.preprocess(images, processor)
        return self.tiles

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        mask = None if image.mask is None else image.mask[:1].cpu()
        nothing = image.features.new_empty(1, image.features.shape[1], 0).cpu()
        self.image = ImageTokens(nothing, image.coords[:1].cpu(), mask)
        self.image_kv = []
        self.clusters = []
        self.received = []
        return self.inner.encoded(image, prompts)

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if self.attention:
            first = kv.sequence(0)
            received = attention_received(Queries(queries.q[:1], queries.seen[:1]), first, per="layer")[0]
            there = slice(None) if first.mask is None else first.mask[0, 0]
            self.received.append((received[there].cpu(), first.coords[0, 0, there].cpu()))
        return self.inner.layer(i, queries, image, kv)

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        image_kv = self.inner.prefilled(image_kv)
        self.image_kv = []
        for kv in image_kv:
            nothing = kv.key.new_empty(1, *kv.key.shape[1:3], 0).cpu()
            mask = None if kv.mask is None else kv.mask[:1].cpu()
            self.image_kv.append(ImageKV(nothing, nothing, kv.coords[:1].cpu(), mask))
        self.clusters = [self.without_padding(owner[0].cpu()) for owner in self.inner.owners]
        return image_kv

    def without_padding(self, owner: Tensor) -> Tensor:
        """Owners of one sequence, [N] or [K, N], as indices of its real tokens, [K, n]."""
        owner = owner.reshape(-1, owner.shape[-1])
        if self.image.mask is None:
            return owner
        real = self.image.mask[0]                                                       # [N]
        return (real.cumsum(0) - 1)[owner[:, real]]
