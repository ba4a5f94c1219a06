"""transformers on the same weights: what `benchmark.py --against transformers` times beside this project.

    Peer(model) ── encode ─► cross_attention_states ── prefill ─► logits, PeerCache ── decode ─► logits ...

Its MllamaForConditionalGeneration on the parameters of a LlamaVision, without a second copy, run as its own
`generate` runs it: its `prepare_inputs_for_generation` and `_update_model_kwargs_for_generation` give the
inputs of every pass, `_prepare_static_cache` the static cache, `get_compiled_call` the compiled step. The
loop around them (logits processors, stopping criteria, growing ids) is left out, which favours it. Its two
deviations from Meta's reference stay as shipped: tapped features come one layer late, and text rows that see
no image attend to all of it. `corrected` mends both, to check that outputs are equal. transformers is
imported when a Peer is made. B batch, T text tokens, I images of a row, P tokens a tile, V vocabulary.
"""
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from model.config import Config
from model.image_tokens import Grid, Tiles
from model.llama_vision import LlamaVision
from weights import official_state_dict
from weights.names import model_name

OLDEST = 5, 18                  # the first release whose static cache and compiled step work for mllama


@dataclass
class PeerCache:
    """What its `generate` carries from one pass to the next."""
    kwargs: dict                                # past_key_values, position_ids, cross_attention_mask, ...
    forward: Callable                           # of one more token: eager, or compiled for a static cache


class Peer:
    """transformers' MllamaForConditionalGeneration on a LlamaVision's parameters, with sdpa attention.

    Raises ValueError with one line where transformers is missing or too old, or cannot decode this shape.
    """

    def __init__(self, model: LlamaVision):
        self.transformers = import_transformers()
        self.version, self.config = self.transformers.__version__, model.config
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
        with torch.device(model.lm_head.weight.device):         # its only buffers, and in no checkpoint
            text.rotary_emb = type(text.rotary_emb)(text.config)
        # Its defaults, but an error where it would go on eagerly, unseen (a graph break, more than 8 shapes
        # in a process), and each shape compiled for itself, as in a process of its own.
        self.compiling = self.transformers.CompileConfig(fullgraph=True, dynamic=False)
        self.eager = False                      # True: a static cache is decoded without compiling

    @torch.no_grad()
    def encode(self, tiles: Tiles) -> Tensor:
        """Images -> cross_attention_states [I, slots·P, D] of all tile slots, as its forward makes them."""
        device, slots = self.model.device, torch.arange(self.config.vision.max_num_tiles)
        ids = torch.tensor([self.config.vision.ratio_id(*grid) for grid in tiles.grid.tolist()])
        mask = (slots < tiles.real.cpu()[:, None]).long()                               # [I, slots]
        states = self.model.model.vision_model(
            pixel_values=tiles.pixels[None].to(device), aspect_ratio_ids=ids[None].to(device),
            aspect_ratio_mask=mask[None].to(device)).last_hidden_state                  # [1, I, slots, P, W]
        return self.model.model.multi_modal_projector(states)[0].flatten(1, 2)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, states: Tensor, grids: list[Grid], max_new_tokens: int,
                static: bool = False) -> tuple[Tensor, PeerCache]:
        """Read prompts [B, T] of equal length -> logits of the last row [B, V] fp32, and a cache.

        `grids` are those of a row's images, the same for all rows; `states` [B·I, slots·P, D], or of one
        row, then copied: there every row has its own. A static cache has room for `max_new_tokens` steps,
        compiled unless `eager` is set. Raises ValueError where text, states and grids do not fit together.
        """
        batch, length = input_ids.shape
        if not grids or len(states) not in (len(grids), batch * len(grids)):
            raise ValueError(f"{len(states)} encoded images for {batch} rows of {len(grids)}: give one for "
                             "each, or those of one row")
        states = states.reshape(-1, len(grids) * states.shape[1], states.shape[2])
        states = states.expand(batch, -1, -1).contiguous()          # a view would slow its projections down
        positions = torch.arange(length, device=input_ids.device).repeat(batch, 1)
        kwargs = {"past_key_values": self._new_cache(batch, len(grids), length + max_new_tokens, static),
                  "cross_attention_mask": self._mask(input_ids, grids), "position_ids": positions,
                  "attention_mask": None, "use_cache": True, "logits_to_keep": 1}       # no padding: None
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=True, **kwargs)
        outputs = self.model(**inputs, cross_attention_states=states, return_dict=True)
        compiled = static and not self.eager
        cache = PeerCache(kwargs, self.model.get_compiled_call(self.compiling) if compiled else self.model)
        return self._advance(cache, outputs), cache

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: PeerCache) -> Tensor:
        """The logits [B, V] fp32 after one more token of each row [B]."""
        inputs = self.model.prepare_inputs_for_generation(tokens[:, None], next_sequence_length=1,
                                                          **cache.kwargs)
        return self._advance(cache, cache.forward(**inputs, return_dict=True))

    def _advance(self, cache: PeerCache, outputs) -> Tensor:
        cache.kwargs = self.model._update_model_kwargs_for_generation(outputs, cache.kwargs, False)
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)     # a CUDA graph reuses its output

    def _mask(self, input_ids: Tensor, grids: list[Grid]) -> Tensor:
        """[B, T, I, slots] 1 where a text row may see a tile, as its processor gives it."""
        own = importlib.import_module("transformers.models.mllama.processing_mllama")
        ranges = [own.get_cross_attention_token_mask(row, self.config.image_token_index)
                  for row in input_ids.tolist()]
        if wrong := [row for row, held in enumerate(ranges) if len(held) != len(grids)]:
            raise ValueError(f"row {wrong[0]} has {len(ranges[wrong[0]])} image tokens in its text but "
                             f"{len(grids)} images; give one for each")
        counts = [[rows * columns for rows, columns in grids]] * len(ranges)
        mask = own.convert_sparse_cross_attention_mask_to_dense(
            ranges, counts, self.config.vision.max_num_tiles, input_ids.shape[1])
        return torch.from_numpy(mask).to(input_ids.device)

    def _new_cache(self, batch: int, images: int, capacity: int, static: bool):
        if not static:
            return self.transformers.DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.model._previous_max_cache_length = -1      # else as long as the longest of earlier prompts
        like = {"pixel_values": torch.empty(batch, images, device="meta")}      # it reads the shape only
        return self.model._prepare_static_cache(cache_implementation="static", batch_size=batch,
                                                max_cache_len=capacity, prefill_chunk_size=None,
                                                model_kwargs=like)

    def image_kv_bytes(self, cache: PeerCache) -> int:
        """Bytes that the keys and values of all tile slots hold, real tiles or not."""
        layers = [cache.kwargs["past_key_values"].layers[i] for i in self.config.text.cross_attention_layers]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @contextmanager
    def corrected(self) -> Iterator[None]:
        """Within it both deviations are mended by hooks, and a static cache is decoded eagerly."""
        vision, text = self.model.model.vision_model, self.model.model.language_model
        hooks = [vision.transformer.register_forward_hook(tap_inputs)]
        hooks += [text.layers[i].register_forward_hook(skip_blind_rows, with_kwargs=True)
                  for i in self.config.text.cross_attention_layers]
        self.eager = True
        try:
            yield
        finally:
            self.eager = False
            for hook in hooks:
                hook.remove()


def tap_inputs(module: nn.Module, inputs: tuple[Tensor], output):
    """The states that enter each local vision layer in place of those that leave it."""
    output.hidden_states = (inputs[0], *output.hidden_states[:-1])


def skip_blind_rows(module: nn.Module, inputs: tuple[Tensor], kwargs: dict, output: Tensor) -> Tensor:
    """Text rows that see no image leave a cross-attention layer as they entered it."""
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


def their_name(official: str) -> str:
    """A parameter's name in MllamaForConditionalGeneration, from its name in official checkpoints."""
    name = model_name(official)
    return name if name.startswith("lm_head.") else "model." + name


def their_config(config: Config, transformers: ModuleType):
    """Our Config as a MllamaConfig, for sdpa. Tied weights are assigned like others, so nothing is tied."""
    vision, text = asdict(config.vision), asdict(config.text)
    vision["attention_heads"] = vision.pop("num_attention_heads")
    vision["vision_output_dim"] = config.vision.output_dim
    for name in "supported_aspect_ratios", "intermediate_layers_indices":
        vision[name] = [list(item) if isinstance(item, tuple) else item for item in vision[name]]
    scaling = text.pop("rope_scaling")
    kind = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling}
    text["rope_parameters"] = {**kind, "rope_theta": text.pop("rope_theta")}
    text["cross_attention_layers"] = list(config.text.cross_attention_layers)
    text |= {"tie_word_embeddings": False, "eos_token_id": list(config.text.eos_token_id),
             "pad_token_id": None}
    return transformers.MllamaConfig(vision_config=vision, text_config=text, attn_implementation="sdpa",
                                     image_token_index=config.image_token_index)
