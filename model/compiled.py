"""The decode step, compiled: the very code of `LlamaVision.decode` as one graph, on a GPU one CUDA graph.

A graph needs its tensors at the same addresses in every step. So the tensors of a cache are copied into
static buffers, which the next prompt uses again; a mask says which tokens are real, and the bias is 0 where
there is none: the graph is the same whatever a pruner keeps or merges, in any layer or head. Lengths and the
batch size are variables of the graph, so there are at most four compilations: with or without an image, for
one sequence or for several. A CUDA graph is recorded again for every length, so on a GPU the lengths of image
keys are rounded up to whole BUCKETs.
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
        # Round to bf16 wherever the plain path does: otherwise greedy tokens would differ.
        options = {"emulate_precision_casts": True, "triton.cudagraphs": device.type == "cuda",
                   "post_grad_custom_post_pass": WRITTEN_OUT if device.type == "cpu" else None}
        self.bucket = BUCKET if device.type == "cuda" else 1
        self.decode = torch.compile(decode, fullgraph=True, options=options)
        self.buffers: dict[str, Tensor] = {}
        self.owner: Callable[[], Cache | None] = lambda: None       # the cache whose tensors the buffers are

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        self._move_in(cache)
        if len(tokens) > 1:
            torch._dynamo.mark_dynamic(tokens, 0)
        torch.compiler.cudagraph_mark_step_begin()          # the logits of the last step may be overwritten
        try:
            return self.decode(tokens, cache)
        except InductorError as error:
            raise ValueError(f"the decode step cannot be compiled here: {str(error).splitlines()[0]}; "
                             "everything works without compiling, too") from None

    def _move_in(self, cache: Cache):
        """Copy into the buffers what is not in them yet; the cache then consists of them."""
        if self.owner() is not cache:
            if self.owner() is not None:            # that cache is still in use: it keeps its buffers
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
            buffers = [self.buffers.get(f"image {part} {i}") for part in ("keys", "mask", "bias")]
            if not (kv.key is buffers[0] and kv.mask is buffers[1] and kv.bias is buffers[2]):
                length = max(2, rounded_up(kv.key.shape[2], self.bucket))       # torch makes no variable of 1
                cache.image_kv[i] = self._image_buffers(i, kv, length)

    def _image_buffers(self, layer: int, kv: ImageKV, length: int) -> ImageKV:
        shape = kv.key.shape[:3]
        mask = kv.key.new_ones(shape, dtype=torch.bool) if kv.mask is None else kv.mask.expand(shape)
        coords = torch.nn.functional.pad(kv.coords, (0, 0, 0, length - shape[2]), value=-1)
        bias = kv.key.new_zeros(shape, dtype=torch.float32) if kv.bias is None else kv.bias.expand(shape)
        return ImageKV(self._buffer(f"image keys {layer}", kv.key, length),
                       self._buffer(f"image values {layer}", kv.value, length), coords,
                       self._buffer(f"image mask {layer}", mask, length),
                       self._buffer(f"image bias {layer}", bias, length))

    def _buffer(self, name: str, tensor: Tensor, length: int | None = None) -> Tensor:
        """`tensor` [B, ...] or [B, G, N, ...], copied into its buffer with N rounded up to `length`."""
        shape = tensor.shape if length is None else (*tensor.shape[:2], length, *tensor.shape[3:])
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self.buffers[name] = tensor.new_empty(shape)
            torch._dynamo.mark_static_address(buffer)
            if length is not None:
                torch._dynamo.mark_dynamic(buffer, 2)
            if len(tensor) > 1:
                torch._dynamo.mark_dynamic(buffer, 0)
        if length is None:
            return buffer.copy_(tensor)
        buffer[:, :, :tensor.shape[2]] = tensor
        buffer[:, :, tensor.shape[2]:] = 0
        return buffer


class WrittenOut(CustomGraphPass):
    """On a CPU, the product of a vector [1, D] and a weight is written as multiply and sum.

    The compiler makes one loop of that, which reads the weight about as fast as memory can deliver it; the
    library that is called otherwise takes about twice as long (benchmarks/README.md), and such products are
    nearly all of decoding.
    """

    def __init__(self):
        self.products = patterns.PatternMatcherPass()
        product = patterns.CallFunction(torch.ops.aten.mm.default, patterns.Arg(), patterns.Arg())
        patterns.register_graph_pattern(product, extra_check=is_vector, pass_dict=self.products)(write_out)

    def __call__(self, graph: Graph):
        self.products.apply(graph)

    def uuid(self) -> bytes:
        """Part of the key under which compiled code is cached."""
        return get_hash_for_files((__file__,))


def is_vector(match: patterns.Match) -> bool:
    return match.args[0].meta["val"].shape[0] == 1


def write_out(match: patterns.Match, x: Tensor, weight: Tensor):
    def product(x: Tensor, weight: Tensor) -> Tensor:
        x = x.as_strided(x.shape, x.stride())               # so that x is computed once, not for every output
        return (weight.mT.float() * x.float()).sum(-1)[None].to(x.dtype)

    match.replace_by_example(product, [x, weight])


WRITTEN_OUT = WrittenOut()          # one for all, because graphs are shared where options are equal
