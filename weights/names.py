"""How checkpoints name their tensors, and what a name tells about the checkpoint.

Official checkpoints and transformers' modules in memory name the same tensor differently; `LlamaVision` has
short names of its own. `model_name` reads every spelling, `official_name` writes the official one.
"""
import re

EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"        # in LlamaVision
NOT_PARAMETERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope_freqs(\.weight)?|rope\.freqs|[kv]_scale)$")
WRAPPERS = re.compile(r"(^|\.)((base_model\.model|module|_orig_mod|_fsdp_wrapped_module|"
                      r"_checkpoint_wrapped_module)\.)+")
UNMERGED = re.compile(r"\.(base_layer|original_module|modules_to_save|lora_(A|B|embedding_A|embedding_B|"
                      r"magnitude_vector))(\.|$)")
QUANTIZED = (                                   # how names end in formats that are not read
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_scale_inv$"), "FP8 in blocks"),
    (re.compile(r"\.weight_scale_\w+$"), "NVIDIA ModelOpt"),
    (re.compile(r"\.(weight|input)_global_scale$"), "compressed-tensors, nvfp4"),
    (re.compile(r"\.(compressed|bitmask|row_offsets)$"), "compressed-tensors, sparse"),
    (re.compile(r"\.(scales|biases)$"), "MLX"),
)
PARTS = (                                       # what a weight consists of in formats that are read
    (re.compile(r"(.+\.weight)\.((?:nested_)?(?:absmax|quant_map)|quant_state\.\w+)"), "bitsandbytes 4-bit"),
    (re.compile(r"(.+)\.(SCB|weight_format)"), "bitsandbytes int8"),
    (re.compile(r"(.+)\.(weight_(?:packed|scale|shape|zero_point|g_idx)|(?:in|out)put_(?:scale|zero_point))"),
     "compressed-tensors"),
    (re.compile(r"(.+)\._weight_(\w+)"), "torchao"),
    (re.compile(r"(.+)\.(W_q|scale|zero|shape|nbits|group_size|axis|packing|compute_dtype|channel_wise|"
                r"encoded_state_dict|offload_meta|optimize|quant_(?:scale|zero)|round_zero|stores_quant_config|"
                r"unpack_view_dtype|view_as_float|zero_scale|(?:scale|zero)_q)"), "HQQ"),
)


def unwrapped(stored: str) -> str:
    """A name without what PEFT, DistributedDataParallel, torch.compile, FSDP and activation checkpointing put
    into the names of the modules that they wrap."""
    return WRAPPERS.sub(r"\1", stored)


def model_name(stored: str) -> str:
    """A parameter's name in LlamaVision, from its official name or transformers' (`model.` before either)."""
    stored = re.sub(r"^(model\.)+", "", unwrapped(stored))
    stored = re.sub(r"^language_model\.model\.", "language_model.", stored)
    return re.sub(r"^language_model\.lm_head\.", "lm_head.", stored)


def official_name(name: str) -> str:
    """The inverse of `model_name`: the name that official checkpoints use."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def is_unmerged(stored: str) -> bool:
    """True for a tensor of a PEFT model that was saved whole, with its adapter beside the weights."""
    return bool(UNMERGED.search(stored))


def is_parameter(stored: str) -> bool:
    """False for what some checkpoints store and no model needs: rotary tables, scales for a cache."""
    return not NOT_PARAMETERS.search(stored)


def quantization_method(stored: str) -> str | None:
    """The method, not read here, that quantizes with tensors of such a name; None for other names."""
    return next((method for pattern, method in QUANTIZED if pattern.search(stored)), None)


def quantized_part(stored: str) -> tuple[str, str, str] | None:
    """The method, the weight and the part that a tensor is of a quantized weight; None for other names."""
    for pattern, method in PARTS:
        match = pattern.fullmatch(stored)
        if match is not None:
            owner, part = match.groups()
            return method, owner if owner.endswith(".weight") else f"{owner}.weight", part
    return None
