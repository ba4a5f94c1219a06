"""The decode step, compiled: the very code of `LlamaVision.decode` as one graph, on a GPU one CUDA graph.

A graph wants its tensors in the same place every time, so what a cache holds moves into buffers that the next
prompt uses again, and a mask says what is real: whatever a pruner keeps, in whichever layers and heads, the
graph is the same. Lengths and the size of a batch are variables of it, so nothing is compiled more than four
times: with an image in sight or without, for one row or for several. A CUDA graph is recorded anew for every
length, though; on a GPU image keys and values are therefore rounded up to whole BUCKETs.
B batch, G key/value heads, N image tokens, d head width.
"""
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor import pattern_matcher as patterns
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.exc import InductorError
from torch.fx import Graph

from model.cache import BUCKET, Cache, rounded_up
from model.image_tokens import ImageKV


class Compiled:
    """Called like the `decode` that it is made of: tokens [B] and a cache -> logits [B, V].

    The first call compiles, which takes a while. Raises ValueError where that is impossible: without a C++
    compiler, say.
    """

    def __init__(self, decode: Callable[[Tensor, Cache], Tensor], device: torch.device):
        # Rounded to bf16 wherever the plain path is, or greedy tokens would not stay the same.
        options = {"emulate_precision_casts": True, "triton.cudagraphs": device.type == "cuda",
                   "post_grad_custom_post_pass": WrittenOut() if device.type == "cpu" else None}
        self.bucket = BUCKET if device.type == "cuda" else 1
        self.decode = torch.compile(decode, fullgraph=True, options=options)
        self.buffers: dict[str, Tensor] = {}
        self.owner: Callable[[], Cache | None] = lambda: None       # whose contents the buffers have

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        self._move_in(cache)
        if len(tokens) > 1:
            torch._dynamo.mark_dynamic(tokens, 0)
        torch.compiler.cudagraph_mark_step_begin()          # the logits of the last step may be written over
        try:
            return self.decode(tokens, cache)
        except InductorError as error:
            raise ValueError(f"the decode step cannot be compiled here: {str(error).splitlines()[0]}; "
                             "everything works without compiling, too") from None

    def _move_in(self, cache: Cache):
        """All that does not stand in the buffers yet; the cache is made of them then."""
        if self.owner() is not cache:
            if self.owner() is not None:            # it is still in use somewhere, and keeps its buffers
                self.buffers = {}
            self.owner = weakref.ref(cache)
            for name, buffers in ("keys", cache.text_keys), ("values", cache.text_values):
                for i, text in enumerate(buffers):
                    buffers[i] = self._buffer(f"{name} {i}", text, text.shape[2])
            cache.positions = self._buffer("positions", cache.positions)
            everywhere = torch.ones_like(cache.positions, dtype=torch.bool)[:, None, None]
            sees_image = everywhere if cache.sees_image is None else cache.sees_image
            cache.sees_image = self._buffer("sees image", sees_image)
        for i, kv in enumerate(cache.image_kv):
            held = self.buffers.get(f"image keys {i}"), self.buffers.get(f"image mask {i}")
            if kv.key is not held[0] or kv.mask is not held[1]:
                length = max(2, rounded_up(kv.key.shape[2], self.bucket))       # a length of 1 is no variable
                cache.image_kv[i] = self._image_buffers(i, kv, length)

    def _image_buffers(self, layer: int, kv: ImageKV, length: int) -> ImageKV:
        shape = kv.key.shape[:3]
        mask = kv.key.new_ones(shape, dtype=torch.bool) if kv.mask is None else kv.mask.expand(shape)
        coords = torch.nn.functional.pad(kv.coords, (0, 0, 0, length - shape[2]), value=-1)
        bias = None if kv.bias is None else self._buffer(f"image bias {layer}", kv.bias.expand(shape), length)
        return ImageKV(self._buffer(f"image keys {layer}", kv.key, length),
                       self._buffer(f"image values {layer}", kv.value, length), coords,
                       self._buffer(f"image mask {layer}", mask, length), bias)

    def _buffer(self, name: str, held: Tensor, length: int | None = None) -> Tensor:
        """`held` [B, ...] or [B, G, N, ...] copied to where it will stand, with N rounded up to `length`."""
        shape = held.shape if length is None else (*held.shape[:2], length, *held.shape[3:])
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self.buffers[name] = held.new_empty(shape)
            torch._dynamo.mark_static_address(buffer)
            if length is not None:
                torch._dynamo.mark_dynamic(buffer, 2)
            if len(held) > 1:
                torch._dynamo.mark_dynamic(buffer, 0)
        if length is None:
            return buffer.copy_(held)
        buffer[:, :, :held.shape[2]] = held
        buffer[:, :, held.shape[2]:] = 0
        return buffer


class WrittenOut(CustomGraphPass):
    """On a CPU the product of one row [1, D] and a weight is written out as multiply and sum.

    The compiler makes one loop of that, which reads the weight about as fast as memory gives it; the library
    that is called otherwise takes about twice as long (benchmarks/README.md), and decoding is little else.
    """

    def __init__(self):
        self.products = patterns.PatternMatcherPass()
        product = patterns.CallFunction(torch.ops.aten.mm.default, patterns.Arg(), patterns.Arg())
        patterns.register_graph_pattern(product, extra_check=one_row, pass_dict=self.products)(write_out)

    def __call__(self, graph: Graph):
        self.products.apply(graph)

    def uuid(self) -> bytes:
        """Compiled code is stored, and found again, by this too."""
        return get_hash_for_files((__file__,))


def one_row(match: patterns.Match) -> bool:
    return match.args[0].meta["val"].shape[0] == 1


def write_out(match: patterns.Match, row: Tensor, weight: Tensor):
    def product(row: Tensor, weight: Tensor) -> Tensor:
        row = row.as_strided(row.shape, row.stride())       # made once, not anew for each row of the weight
        return (weight.mT.float() * row.float()).sum(-1)[None].to(row.dtype)

    match.replace_by_example(product, [row, weight])
