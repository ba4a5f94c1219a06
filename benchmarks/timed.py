"""A pruner around another one that times its hooks: what is a method's own work?

Own work is what a method does in its hooks, and outside of the model in `around`: asking a second model, for
example. On a GPU each hook waits for the device before and after, which slows the rest of the answer: total
times are measured without this clock.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import with_time
from model.answer import Answer
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.llama_vision import LlamaVision
from pruning import Pruner, Wrapper


class Timed(Wrapper):
    """Does what the pruner inside does. `ms` are the milliseconds of its own work until the first token
    (`prefill`) and after it (`decode`); `read` are the bytes of image KV that each decode step reads."""

    def __init__(self, inner: Pruner, device: torch.device):
        super().__init__(inner)
        self.device = device
        self.ms = {"prefill": 0.0, "decode": 0.0}
        self.read: list[float] = []

    def begin(self, model: LlamaVision):
        self._time("prefill", lambda: self.inner.begin(model))

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        return self._time("prefill", lambda: self.inner.encoded(image, prompts))

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        return self._time("prefill", lambda: self.inner.layer(i, queries, image, kv))

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        image_kv = self._time("prefill", lambda: self.inner.prefilled(image_kv))
        self.read.append(read_bytes(image_kv))
        return image_kv

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        image_kv = self._time("decode", lambda: self.inner.stepped(step, queries, image_kv))
        self.read.append(read_bytes(image_kv))
        return image_kv

    def logits(self, logits: Tensor) -> Tensor:
        return self._time("decode", lambda: self.inner.logits(logits))

    def around(self, generate: Callable[..., Answer]) -> Callable[..., Answer]:
        """Adds what happens outside of this model's own `generate`."""
        def own(model: LlamaVision, *args) -> Answer:
            ms, answer = with_time(partial(generate, model, *args), self.device)
            if model is self.model:
                self.ms["prefill"] -= ms
            return answer

        def everything(model: LlamaVision, *args) -> Answer:
            self.model = model
            ms, answer = with_time(partial(self.inner.around(own), model, *args), self.device)
            self.ms["prefill"] += ms
            return answer

        return everything

    def _time(self, part: str, hook: Callable):
        ms, result = with_time(hook, self.device)
        self.ms[part] += ms
        return result


def read_bytes(image_kv: list[ImageKV]) -> float:
    """Bytes of the image keys and values that a step's attention reads. Padding does not count."""
    return sum(float(kv.counts().sum()) * (kv.key.nbytes + kv.value.nbytes) / kv.key[:, 0, :, 0].numel()
               for kv in image_kv)
