"""What config.json says about quantization: which formats are read, and the right names of the others."""
from weights.messages import one_line

NAMES = {                       # quant_method in config.json: what people call it
    "gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "autoround": "AutoRound", "quark": "AMD Quark",
    "modelopt": "NVIDIA ModelOpt", "fp8": "FP8 in blocks", "fbgemm_fp8": "FBGEMM FP8", "mxfp4": "MXFP4",
    "aqlm": "AQLM", "eetq": "EETQ", "quanto": "Quanto", "higgs": "HIGGS", "spqr": "SpQR", "vptq": "VPTQ",
    "bitnet": "BitNet", "intel/auto-round": "AutoRound", "exl2": "EXL2"}
OWN_METHOD = "trimmed-llama"      # of folders that `python -m weights.quantize` writes
READ = "bitsandbytes", "compressed-tensors", "torchao", "hqq"
TORCHAO = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig",
           "Float8DynamicActivationFloat8WeightConfig", "IntxWeightOnlyConfig",
           "Int8DynamicActivationIntxWeightConfig", "FqnToConfig", "ModuleFqnToConfig")
WORDS = "bitsandbytes, compressed-tensors, torchao or HQQ"
COMPRESSED = ("naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "mixed-precision",
              "dense")


def quantized(method: object) -> str:
    """What to say about a checkpoint in a format that is not read."""
    return (f"the checkpoint is quantized ({one_line(method, 80)}), which is not read here; use the bf16 "
            f"checkpoint, or one by {WORDS}")


def refuse_unread(sections: list[dict]):
    """Raises ValueError with one line where a section of config.json names a format that is not read."""
    for section in sections:
        if section.get("quantization"):                 # MLX: only group size and bits, no method
            raise ValueError(quantized("MLX"))
        for key, usual in ("quantization_config", None), ("compression_config", "compressed-tensors"):
            details = section.get(key)
            if details:
                _refuse_details(details, usual)


def _refuse_details(details: object, usual: str | None):
    """`usual` is the method where none is named: that of llm-compressor's first files."""
    if not isinstance(details, dict):
        raise ValueError(quantized(details))
    method = details.get("quant_method", usual)
    if method is None and (details.get("load_in_4bit") or details.get("load_in_8bit")):
        method = "bitsandbytes"                         # before transformers 4.33
    if method not in (OWN_METHOD, *READ):
        name = NAMES.get(method, method) if isinstance(method, str) else method
        raise ValueError(quantized(name or "by an unnamed method"))
    if method == "compressed-tensors":
        _refuse_compressed(details)
    if method == "torchao":
        _refuse_torchao(details.get("quant_type"))


def _refuse_compressed(details: dict):
    groups = details.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    formats = [part.get("format") for part in [details, *groups] if isinstance(part, dict)]
    for name in formats:
        if name is not None and name not in COMPRESSED:
            raise ValueError(quantized(f"compressed-tensors, {name}"))
    transforms = details.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise ValueError(quantized("compressed-tensors with rotated weights"))
    sparse = details.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format") not in (None, "dense"):
        raise ValueError(quantized(f"compressed-tensors, {one_line(sparse['format'], 40)}"))


def _refuse_torchao(value: object):
    """Every "_type" that is a config, at any depth, must be of a layout that is read."""
    names = [value] if isinstance(value, str) else []           # torchao's first way, in pickles only
    parts = [value]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            kind = part.get("_type")
            names += [kind] if isinstance(kind, str) and kind.endswith("Config") else []
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    for name in names:
        if name not in TORCHAO:
            raise ValueError(quantized(f"torchao, {one_line(name, 50)}"))
