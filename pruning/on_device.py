"""OnDevice: a pruner that works on a model whose layers are on several devices.

It finds queries, keys and values of all layers on one device, the first, and what it leaves of them goes back
to where it came from.
"""
from dataclasses import replace

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.pruner import Pruner, Wrapper
from weights.devices import moved


def on_device(pruner: Pruner | None, devices: list[torch.device]) -> Pruner | None:
    """A pruner as a model on these devices needs it; itself, if there is one device or nothing to do."""
    if len(devices) == 1 or not isinstance(pruner, Pruner) or pruner.keeps_all:
        return pruner
    return OnDevice(pruner, devices[0])


class OnDevice(Wrapper):
    def __init__(self, inner: Pruner, device: torch.device):
        super().__init__(inner)
        self.name = inner.name
        self.device = device

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        here = moved(kv, self.device)
        queries = replace(queries, **{name: moved(part, self.device) for name, part in vars(queries).items()})
        image, after = self.inner.layer(i, queries, image, here)
        return image, back([kv], [here], [after])[0]

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        here = [moved(kv, self.device) for kv in image_kv]
        return back(image_kv, here, self.inner.prefilled(list(here)))

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        here = [moved(kv, self.device) for kv in image_kv]
        after = self.inner.stepped(step, [moved(q, self.device) for q in queries], here)
        return image_kv if after is here else back(image_kv, here, after)


def back(image_kv: list[ImageKV], here: list[ImageKV], after: list[ImageKV]) -> list[ImageKV]:
    """What a method left, on the device of each layer; a layer that it left alone is the same object."""
    return [kv if new is whole else moved(new, kv.key.device)
            for kv, whole, new in zip(image_kv, here, after, strict=True)]
