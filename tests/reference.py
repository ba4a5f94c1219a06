"""A run of `generate` that is watched, and the slow reference for it: the whole image, masked.

The methods run inside the real `generate.generate`. What they left is read off the caches; then the network
is computed once more by hand, with everything else masked, and the logits must be the same.
B batch, T text tokens, N image tokens, H query heads, G key/value heads, K = 1 or G sets of kept tokens.
"""
import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
from helpers import I
from torch import Tensor

from generate import generate, no_one
from model.answer import Answer
from model.cache import Cache
from model.decoder import CrossAttentionLayer, SelfAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, visible_images
from model.layers import rotary_angles, rotary_frequencies
from model.llama_vision import LlamaVision
from pruning import Pruner
from pruning.methods import sgl
from pruning.methods.sgl import load_guide

NEW_TOKENS = [7, 30, 11, 52, 9, 41]             # what the watched runs "generate"


@dataclass
class Run:
    """What `generate.generate` did, step by step."""
    answer: Answer
    logits: Tensor                      # [B, steps, V]
    fed: list[int]                      # the new tokens, the same for every sequence
    read: list[ImageKV]                 # what each cross-attention layer attended to in prefill
    held: list[list[ImageKV]]           # what each of them decodes with, after prefill and after every step


@dataclass
class Case:
    """A method with some options, and its run on the mixed batch."""
    network: LlamaVision
    image: ImageTokens
    pruner: Pruner
    run: Run


def forced(network: LlamaVision, prompts: list[list[int]], image: ImageTokens | None,
           pruner: Pruner | None = None, steps: int = 2) -> Run:
    """Run `generate.generate` with new tokens that are given (teacher forcing), and watch it."""
    fed = NEW_TOKENS[:steps]
    logits, caches, read, held = [], [], [], []

    def prefill(*arguments) -> tuple[Tensor, Cache]:
        first, cache = type(network).prefill(network, *arguments)
        caches.append(cache)
        return first, cache

    def layer(i: int, *arguments) -> tuple[ImageTokens, ImageKV]:
        later, kv = type(pruner).layer(pruner, i, *arguments)
        read.append(kv)
        return later, kv

    def sample(new: Tensor) -> Tensor:
        logits.append(new)
        held.append(list(caches[0].image_kv))
        return torch.full((len(new),), fed[len(logits) - 1])

    watching = nullcontext() if pruner is None else patch.object(pruner, "layer", layer)
    guided = nullcontext()
    if sgl.load_guide is load_guide:                # the bundled guide fits none of these networks
        guide = guide_like(network)
        guided = patch.object(sgl, "load_guide", lambda source, device, dtype: guide)
    run = generate if pruner is None else pruner.around(generate)
    with patch.object(network, "prefill", prefill), watching, guided:
        answer = run(network, prompts, image, steps, (), sample, no_one, pruner, None)
    return Run(answer, torch.stack(logits, dim=1), fed, read, held)


@cache
def guide_like(network: LlamaVision) -> LlamaVision:
    """A copy, since what the guide reads is not watched."""
    return copy.deepcopy(network)


# ----- the reference


def masked(network: LlamaVision, run: Run, prompts: list[list[int]], image: ImageTokens | None,
           pruner: Pruner = Pruner()) -> Tensor:                                        # noqa: B008
    """The logits [B, steps, V] of a Run, from the whole image with -inf where its pruner dropped a token; or,
    where the pruner makes one token of several, from the keys and values that it left. There a token with ln
    n for its bias is not biased but repeated n times.

    One pass over the prompt and the new tokens of each sequence, and over each of its branches: no batch, no
    cache, and nothing is ever dropped.
    """
    steps = masked_branches(network, run, prompts, image, pruner.merges).unbind(1)
    return torch.stack([pruner.logits(step)[:len(prompts)] for step in steps], dim=1)


def masked_branches(network: LlamaVision, run: Run, prompts: list[list[int]], image: ImageTokens | None,
                    merges: bool = False) -> Tensor:
    """The same before hook 5, of each branch: [branches·B, steps, V]."""
    B = len(prompts)
    branches = len(run.read[0].key) // B
    return torch.stack([masked_sequence(network, run, prompt, image, b, b + branch * B, merges)
                        for branch in range(branches) for b, prompt in enumerate(prompts)])


@torch.inference_mode()
def masked_sequence(network: LlamaVision, run: Run, prompt: list[int], image: ImageTokens | None, b: int,
                    branch: int, merges: bool) -> Tensor:
    """The logits [steps, V] of one branch of sequence b."""
    ids = torch.tensor(prompt + run.fed[:-1])
    decoder = network.language_model
    seen = visible_images(ids[None], I)[0]                                              # [T, 2]
    angles = rotary_angles(torch.arange(len(ids))[None], rotary_frequencies(decoder.config, ids.device))
    x = decoder.embed_tokens(ids)                                                       # [T, D]
    i = 0
    for layer in decoder.layers:
        if isinstance(layer, SelfAttentionLayer):
            x = layer(x[None], angles)[0][0]
        elif image is not None:
            held = [run.read[i]] * len(prompt) + [kvs[i] for kvs in run.held[:-1]]      # of each position
            if merges:
                x = torch.cat([look(layer, x[t:t + 1], *left(kv, branch, seen[t:t + 1]))
                               for t, kv in enumerate(held)])
            else:
                real = slice(None) if image.mask is None else image.mask[b]
                coords = image.coords[b][real]                                          # [N, 4]
                there = {}
                for kv in held:
                    if id(kv) not in there:
                        there[id(kv)] = present(kv, branch, coords)
                present_at = torch.stack([there[id(kv)] for kv in held], dim=1)         # [G, T, N]
                inside = (coords[:, 0] >= seen[:, :1]) & (coords[:, 0] < seen[:, 1:])   # [T, N]
                x = look(layer, x, *keys_values(layer, image.features[b][real]), present_at & inside)
            i += 1
    return network.lm_head(decoder.norm(x))[len(prompt) - 1:]


def present(kv: ImageKV, b: int, coords: Tensor) -> Tensor:
    """Which of the tokens with these coords [N, 4] are in `kv`: [G, N] bool."""
    same = (kv.coords[b][:, :, None] == coords).all(-1)                                 # [K, n, N]
    same = same if kv.mask is None else same & kv.mask[b][:, :, None]
    return same.any(1).expand(kv.key.shape[1], -1)


def keys_values(layer: CrossAttentionLayer, features: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by hand: features [N, D] -> two of [G, N, d]."""
    own = layer.cross_attn
    k = own.k_norm(own.k_proj(features).unflatten(-1, (own.kv_heads, -1)))
    v = own.v_proj(features).unflatten(-1, (own.kv_heads, -1))
    return k.transpose(0, 1), v.transpose(0, 1)


def look(layer: CrossAttentionLayer, x: Tensor, k: Tensor, v: Tensor, inside: Tensor,
         bias: Tensor | None = None) -> Tensor:
    """A cross-attention layer by hand: x [T, D] attends to keys and values [G, N, d] where `inside` [K, T, N]
    says so; `bias` [K, N] is added to the scores."""
    own = layer.cross_attn
    q = own.q_norm(own.q_proj(layer.input_layernorm(x)).unflatten(-1, (own.heads, -1)))     # [T, H, d]
    k, v = (t.repeat_interleave(own.heads // own.kv_heads, 0) for t in (k, v))              # [H, N, d]
    scores = torch.einsum("thd,hnd->htn", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.repeat_interleave(own.heads // len(bias), 0)[:, None]
    hidden = ~inside.repeat_interleave(own.heads // len(inside), 0)
    h = torch.einsum("htn,hnd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)
    y = x + layer.cross_attn_attn_gate.tanh() * own.o_proj(h)
    y = y + layer.cross_attn_mlp_gate.tanh() * layer.mlp(layer.post_attention_layernorm(y))
    return torch.where(inside.any(-1).all(0)[:, None], y, x)


def left(kv: ImageKV, b: int, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The keys and values of `kv`, which of them positions see that see these images [T, 2]: [K, T, N]; and
    their bias [K, N], unless they can be repeated instead."""
    image = kv.coords[b][..., 0]                                                        # [K, N]
    there = torch.ones_like(image, dtype=torch.bool) if kv.mask is None else kv.mask[b]
    key, value, bias = kv.key[b], kv.value[b], None if kv.bias is None else kv.bias[b]
    counts = repeats(kv, b)
    if counts is not None:
        order, there = repeated(counts)                                                 # [K, n]
        image, bias = image.expand(len(order), -1).gather(1, order), None
        key, value = (t.take_along_dim(order[..., None], 1) for t in (key, value))
    image = image[:, None]                                                              # [K, 1, N]
    inside = (image >= seen[:, :1]) & (image < seen[:, 1:]) & there[:, None]
    return key, value, inside, bias


def repeats(kv: ImageKV, b: int) -> Tensor | None:
    """How many tokens each one stands for, [K, N], if the biases of sequence b are ln of whole numbers."""
    if kv.bias is None:
        return None
    exact = kv.bias[b].double().exp()
    exact = exact if kv.mask is None else torch.where(kv.mask[b], exact, 0)
    return exact.round().long() if (exact - exact.round()).abs().max() <= 1e-4 * exact.max() else None


def repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each token as often as `counts` [K, N] says, [K, n], and where that is no padding."""
    order = [torch.arange(len(own)).repeat_interleave(own) for own in counts]
    there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in order], batch_first=True).bool()
    return torch.nn.utils.rnn.pad_sequence(order, batch_first=True), there
