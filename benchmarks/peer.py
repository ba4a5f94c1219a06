"""transformers on the same weights: what `benchmark.py --against transformers` times beside this project.

    Peer(model) ── encode ─► PeerImage ── prefill ─► logits, PeerCache ── decode ─► logits ...

A Peer has the methods of a LlamaVision that `generate` calls, so both are decoded by the same loop. Behind
them is transformers' MllamaForConditionalGeneration, which uses the parameters of the LlamaVision, without
a second copy, and runs as in its own `generate`: the inputs of every pass come from its
`prepare_inputs_for_generation`, the compiled step from its `get_compiled_call`, the caches are its
DynamicCache and StaticCache. Only public names of transformers are used; the one that differs between
releases is looked up (`cache_argument`). Its two deviations from Meta's reference stay as shipped: tapped
features come one layer late, and query positions that see no image attend to all of it. `corrected`
corrects both, to check that outputs are equal. transformers is imported when a Peer is made.
B batch, T text tokens, I images of a sequence, P tokens of a tile, D model width, V vocabulary.
"""
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from model.config import EXTRA_EMBEDDINGS, Config
from model.image_tokens import Grid, ImageKV, Tiles
from model.llama_vision import LlamaVision
from weights import official_state_dict
from weights.names import model_name

OLDEST = 5, 18                  # the first release whose static cache and compiled step work for mllama


@dataclass
class PeerImage:
    """Encoded images, those of one sequence for all sequences or those of each: transformers' own form."""
    states: Tensor                              # [I or B·I, slots·P, D] its cross_attention_states
    grids: list[Grid]                           # of the I images of a sequence, the same in each


@dataclass
class PeerCache:
    """What its `generate` carries from one pass to the next, with the names that our `generate` knows."""
    kv: object                                  # transformers' DynamicCache or StaticCache
    cross_attention_layers: tuple[int, ...]
    position_ids: Tensor                        # [B, T] of the tokens of the next pass
    mask: Tensor                                # [B, T, I, slots] 1 where they see a tile
    image_kv: list[ImageKV] = field(default_factory=list)       # for pruners: there are none here
    queries: list[Tensor] = field(default_factory=list)

    def kept(self) -> list[list[float]]:
        """Nothing is pruned and nothing is counted."""
        return [[] for _ in self.position_ids]

    def image_bytes(self) -> int:
        """Bytes of the keys and values of all tile slots, used or not."""
        return self._bytes(True)

    def text_bytes(self) -> int:
        return self._bytes(False)

    def _bytes(self, cross_attention: bool) -> int:
        layers = [layer for i, layer in enumerate(self.kv.layers)
                  if (i in self.cross_attention_layers) == cross_attention]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


class Peer:
    """transformers' MllamaForConditionalGeneration on a LlamaVision's parameters, with sdpa attention.

    `static`: with a static cache and a compiled decode step. Its cache is used again by the next prefill of
    the same shape, as it has to be for a CUDA graph: one answer at a time.
    Raises ValueError with one line if transformers is missing or too old, or cannot decode this shape.
    """

    def __init__(self, model: LlamaVision, static: bool = False):
        self.transformers = import_transformers()
        self.version = self.transformers.__version__
        self.ours = model
        self.config = model.config
        self.static = static
        if 0 in model.config.text.cross_attention_layers:
            raise ValueError("transformers cannot decode where the first layer is a cross-attention layer: "
                             "it reads the text's length there; choose other cross_attention_layers")
        with torch.device("meta"):
            self.model = self.transformers.MllamaForConditionalGeneration(
                their_config(model.config, self.transformers))
        state = {their_name(name): tensor for name, tensor in official_state_dict(model).items()}
        self.model.load_state_dict(state, assign=True)
        self.model.eval().requires_grad_(False)
        text = self.model.model.language_model
        with torch.device(model.device):         # its only buffers, and in no checkpoint
            text.rotary_emb = type(text.rotary_emb)(text.config)
        # Its defaults, with two changes. It raises an error where it would silently continue eagerly (a graph
        # break, or more than 8 shapes in a process), and it compiles for each shape, as in a new process.
        self.compiling = self.transformers.CompileConfig(fullgraph=True, dynamic=False)
        self.cache_argument = cache_argument(self.model)
        self.eager = not static                 # True with a static cache: decode without compiling
        self.static_caches: dict[tuple[int, int, int], object] = {}

    # ----- what `generate` calls, as in LlamaVision

    def check_prompts(self, prompts: list[list[int]], max_new_tokens: int):
        self.ours.check_prompts(prompts, max_new_tokens)

    def pad_right(self, prompts: list[list[int]]) -> tuple[Tensor, list[int]]:
        return self.ours.pad_right(prompts)

    def tokens_seen(self, input_ids: Tensor, lengths: list[int], image: PeerImage) -> list[int]:
        """All tile slots are counted, since it attends to them."""
        return [image.states.shape[1] * len(image.grids)] * len(lengths)

    @torch.no_grad()
    def encode(self, tiles: Tiles) -> PeerImage:
        """Images -> cross_attention_states [I, slots·P, D] of all tile slots, as its forward makes them."""
        device = self.model.device
        grids = [tuple(grid) for grid in tiles.grid.tolist()]
        slots = torch.arange(self.config.vision.max_num_tiles)
        ids = torch.tensor([self.config.vision.ratio_id(*grid) for grid in grids])      # [I]
        mask = (slots < tiles.real.cpu()[:, None]).long()                               # [I, slots]
        states = self.model.model.vision_model(
            pixel_values=tiles.pixels[None].to(device), aspect_ratio_ids=ids[None].to(device),
            aspect_ratio_mask=mask[None].to(device)).last_hidden_state                  # [1, I, slots, P, W]
        return PeerImage(self.model.model.multi_modal_projector(states)[0].flatten(1, 2), grids)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, lengths: list[int], image: PeerImage, max_new_tokens: int,
                pruner: object = None) -> tuple[Tensor, PeerCache]:
        """Read prompts [B, T] of equal length -> logits of the last position [B, V] fp32, and a cache.

        Images of one sequence are copied for every sequence: transformers has no shared images. A static
        cache has room for `max_new_tokens` steps. Raises ValueError where text and images do not fit
        together, and for prompts of several lengths.
        """
        batch, length = input_ids.shape
        grids = image.grids
        states = image.states
        if set(lengths) != {length}:
            raise ValueError(f"prompts of {min(lengths)} to {max(lengths)} tokens: give them one length")
        if not grids or len(states) not in (len(grids), batch * len(grids)):
            raise ValueError(f"{len(states)} encoded images for {batch} sequences with {len(grids)} images "
                             "each: give one for each image, or those of one sequence")
        states = states.reshape(-1, len(grids) * states.shape[1], states.shape[2])
        states = states.expand(batch, -1, -1).contiguous()      # [B, I·slots·P, D]; a view would be slower
        cache = PeerCache(
            kv=self._cache(batch, len(grids), length + max_new_tokens),
            cross_attention_layers=self.config.text.cross_attention_layers,
            position_ids=torch.arange(length, device=input_ids.device).repeat(batch, 1),
            mask=self._mask(input_ids, grids))
        inputs = self._inputs(input_ids, cache, first=True)
        outputs = self.model(**inputs, cross_attention_states=states, return_dict=True)
        return self._advance(cache, outputs), cache

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: PeerCache) -> Tensor:
        """The logits [B, V] fp32 after one more token of each sequence [B]."""
        forward = self.model if self.eager else self.model.get_compiled_call(self.compiling)
        inputs = self._inputs(tokens[:, None], cache, first=False)
        return self._advance(cache, forward(**inputs, return_dict=True))

    # ----- what it takes to run transformers

    def _inputs(self, input_ids: Tensor, cache: PeerCache, first: bool) -> dict:
        """The arguments of the next pass, as its `generate` gets them. There is no padding to mask."""
        return self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=input_ids.shape[1], is_first_iteration=first,
            position_ids=cache.position_ids, attention_mask=None, cross_attention_mask=cache.mask,
            use_cache=True, logits_to_keep=1, **{self.cache_argument: cache.kv})

    def _advance(self, cache: PeerCache, outputs) -> Tensor:
        """The logits [B, V] of a pass. The next token has the next position and sees what the last did."""
        cache.position_ids = cache.position_ids[:, -1:] + 1                 # [B, 1]
        cache.mask = cache.mask[:, -1:]                                     # [B, 1, I, slots]
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)     # a CUDA graph reuses its output

    def _mask(self, input_ids: Tensor, grids: list[Grid]) -> Tensor:
        """[B, T, I, slots] 1 where a query position sees a tile, as its processor gives it."""
        own = importlib.import_module("transformers.models.mllama.processing_mllama")
        ranges = [own.get_cross_attention_token_mask(ids, self.config.image_token_index)
                  for ids in input_ids.tolist()]
        if wrong := [b for b, images in enumerate(ranges) if len(images) != len(grids)]:
            raise ValueError(f"sequence {wrong[0]} has {len(ranges[wrong[0]])} image tokens in its text but "
                             f"{len(grids)} images; give one for each")
        counts = [[rows * columns for rows, columns in grids]] * len(ranges)
        mask = own.convert_sparse_cross_attention_mask_to_dense(
            ranges, counts, self.config.vision.max_num_tiles, input_ids.shape[1])
        return torch.from_numpy(mask).to(input_ids.device)

    def _cache(self, batch: int, images: int, capacity: int):
        """An empty cache; a static one has room for `capacity` text tokens, and for all tile slots."""
        text = self.model.config.get_text_config(decoder=True)
        if not self.static:
            return self.transformers.DynamicCache(config=text)
        shape = batch, images, capacity
        if shape in self.static_caches:
            self.static_caches[shape].reset()
            return self.static_caches[shape]
        cache = self.transformers.StaticCache(config=text, max_cache_len=capacity)
        vision = self.config.vision
        image_tokens = images * vision.max_num_tiles * vision.tokens_per_tile
        for i in self.config.text.cross_attention_layers:
            cache.layers[i] = self.transformers.StaticLayer(max_cache_len=image_tokens)
        self.static_caches = {shape: cache}                     # one at a time, or memory would fill up
        return cache

    @contextmanager
    def corrected(self) -> Iterator[None]:
        """A context in which hooks correct both deviations, and a static cache is decoded eagerly."""
        text = self.model.model.language_model
        hooks = [self.model.model.vision_model.transformer.register_forward_hook(tap_inputs)]
        hooks += [text.layers[i].register_forward_hook(skip_unseeing, with_kwargs=True)
                  for i in self.config.text.cross_attention_layers]
        self.eager = True
        try:
            yield
        finally:
            self.eager = not self.static
            for hook in hooks:
                hook.remove()


def tap_inputs(module: nn.Module, inputs: tuple[Tensor], output):
    """Take the states that enter each local vision layer, not those that leave it."""
    output.hidden_states = (inputs[0], *output.hidden_states[:-1])


def skip_unseeing(module: nn.Module, inputs: tuple[Tensor], kwargs: dict, output: Tensor) -> Tensor:
    """Query positions that see no image leave a cross-attention layer as they entered it."""
    return torch.where(kwargs["full_text_row_masked_out_mask"][:, 0].bool(), output, inputs[0])


def import_transformers() -> ModuleType:
    """The package. Raises ValueError with one line that says what to install."""
    oldest = ".".join(map(str, OLDEST))
    advice = f"`pip install \"transformers>={oldest},<6\"`"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(f"--against transformers needs transformers, which is missing: {advice}") from None
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise ValueError(f"transformers {transformers.__version__} is too old to compare with: its static "
                         f"cache fails on this model before {oldest}; {advice}")
    return transformers


def cache_argument(model: nn.Module) -> str:
    """What the forward of this release calls its cache: `cache` since 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def their_name(official: str) -> str:
    """A parameter's name in MllamaForConditionalGeneration, from its name in official checkpoints."""
    name = model_name(official)
    return name if name.startswith("lm_head.") else "model." + name


def their_config(config: Config, transformers: ModuleType):
    """Our Config as a MllamaConfig, for sdpa. No weights are tied in it: each is assigned by its name.

    Raises ValueError where transformers cannot load such a checkpoint.
    """
    if config.text.extra_embeddings != EXTRA_EMBEDDINGS:
        raise ValueError(f"--against transformers: its embedding must have {EXTRA_EMBEDDINGS} rows more than "
                         f"its head, and this one has {config.text.extra_embeddings}: leave out --against")
    vision = asdict(config.vision)
    text = asdict(config.text)
    del text["extra_embeddings"]
    vision["attention_heads"] = vision.pop("num_attention_heads")
    vision["vision_output_dim"] = config.vision.output_dim
    for name in "supported_aspect_ratios", "intermediate_layers_indices":
        vision[name] = [list(item) if isinstance(item, tuple) else item for item in vision[name]]
    scaling = text.pop("rope_scaling")
    kind = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling}
    text["rope_parameters"] = {**kind, "rope_theta": text.pop("rope_theta")}
    text["cross_attention_layers"] = list(config.text.cross_attention_layers)
    text |= {"tie_word_embeddings": False, "eos_token_id": list(config.text.eos_token_id),
             "pad_token_id": None, "bos_token_id": 0}       # not used; its default is not in every vocabulary
    return transformers.MllamaConfig(vision_config=vision, text_config=text, attn_implementation="sdpa",
                                     image_token_index=config.image_token_index)
