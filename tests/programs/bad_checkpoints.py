"""Rows of the table of bad input: missing checkpoints, and the bundled one with one file damaged."""
from pathlib import Path

import torch
from bad_files import (
    INDEX,
    NORM,
    QUESTION,
    SHARDS,
    TINY,
    WEIGHTS,
    Bench,
    Prepare,
    config,
    entry_of_json,
    flags,
    folder_of,
    hub,
    index,
    model,
    no_revision,
    preprocessor,
    tensor,
    tensors,
    weights,
)


def linked(name: str, *args: str) -> Prepare:
    """A question with a link to itself of this name in the folder where the program runs."""
    def prepare(bench: Bench) -> list[str]:
        (bench.folder / name).symlink_to(name)
        return [*args, *QUESTION]
    return prepare


def not_utf8(bench: Bench) -> list[str]:
    """A question to a checkpoint in a folder of another encoding."""
    folder = Path(bench.checkpoint())
    return ["--model", str(folder.rename(folder.with_name("caf\udce9"))), *QUESTION]


LORA = b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1}'
PLACES = [
    ("no such folder", flags("--model", "./none"), "'./none'", "nor a folder here"),
    ("no name", flags("--model", ""), "''", "'tiny'", "hub id"),
    ("not a hub id", flags("--model", "llama 11b"), "'llama 11b'", "hub id like owner/name"),
    ("not in the cache, offline", hub(), "owner/name", "cache", "HF_HUB_OFFLINE"),
    ("revision unknown", hub("--revision", "v9", error=no_revision), "no revision 'v9'", "branch"),
    ("revision of tiny", flags("--revision", "main"), "tiny", "'main'", "local folder"),
    ("revision of a folder", model(also=("--revision", "v1", *QUESTION)), "'v1'", "local folder"),
    ("empty folder", folder_of(), "no config.json"),
    ("GGUF folder", folder_of("x-Q4_K_M.gguf"), "GGUF", "safetensors"),
    ("pth folder", folder_of("consolidated.00.pth", "params.json"), ".pth", "safetensors"),
    ("adapter", folder_of("adapter_config.json", "adapter_model.safetensors"), "adapter alone",
     "--model BASE --adapter"),
    ("adapter that is nowhere", flags("--adapter", "./none"), "adapter './none'", "hub id"),
    ("model as an adapter", flags("--adapter", str(TINY)), "no adapter_config.json there"),
    ("none beside an adapter", flags("--adapter", "none", "--adapter", "a/b"), "'none'", "leave it out"),
    ("adapter without weights", lambda b: ["--adapter", str(Path(b.path("adapter_config.json", LORA)).parent),
                                           *QUESTION], "no adapter_model.safetensors", "with peft"),
    ("adapter of another kind", model(("adapter_config.json", b'{"peft_type": "IA3"}'), also=(
        "--adapter", "checkpoint", *QUESTION)), "'IA3'", "merge_and_unload"),
    ("adapter beside weights", model(("adapter_config.json", LORA)), "beside the weights", "--adapter none"),
    ("GGUF file", lambda b: ["--model", b.path("x.gguf", b"GGUF"), *QUESTION], "GGUF", "safetensors"),
    ("link to itself", linked("m", "--model", "m"), "m: cannot be read", "symbolic links"),
    ("folder not UTF-8", not_utf8, "caf\\udce9", "not valid UTF-8", "rename"),
    ("weights file", flags("--model", str(TINY / WEIGHTS)), "is a file", "pass the folder"),
]

CONFIGS = [
    ("not JSON", model(("config.json", b"{")), "config.json", "not readable as JSON"),
    ("not UTF-8", model(("config.json", b"\xff\xfe")), "config.json", "not readable"),
    ("a list", model(("config.json", b"[]")), "config.json", "'list'"),
    ("other model", config("model_type", "llava"), "'llava'", "'mllama'"),
    ("section a list", config("text_config", [1]), "text_config"),
    ("heads that do not fit", config("text_config.num_attention_heads", 3), "text_config", "3 heads"),
    ("size 0", config("text_config.vocab_size", 0), "vocab_size is 0"),
    ("size a word", config("text_config.vocab_size", "640"), "vocab_size is '640'"),
    ("size of another model", config("text_config.intermediate_size", 512), "has the shape", "[512, 160]"),
    ("base beyond all size", config("text_config.rope_theta", 10 ** 400), "rope_theta"),
    ("unknown rope", config("text_config.rope_scaling", {"rope_type": "yarn"}), "'yarn'", "'llama3'"),
    ("rope a word", config("text_config.rope_scaling", "llama3"), "rope_scaling"),
    ("rope a list", config("text_config.rope_parameters", ["llama3"]), "rope_parameters"),
    ("layers a number", config("text_config.cross_attention_layers", 3), "cross_attention_layers"),
    ("layers words", config("text_config.cross_attention_layers", ["2"]), "cross_attention_layers"),
    ("layers outside", config("text_config.cross_attention_layers", [2, 70]), "cross_attention_layers", "70"),
    ("taps a word", config("vision_config.intermediate_layers_indices", "1"), "intermediate_layers_indices"),
    ("ratios numbers", config("vision_config.supported_aspect_ratios", [1, 2]), "supported_aspect_ratios"),
    ("stop tokens an object", config("text_config.eos_token_id", {"a": 1}), "eos_token_id"),
    *((method, config(f"{section}quantization_config", {"quant_method": method}), f"quantized ({name})",
       "bf16 checkpoint")
      for method, name, section in (("gptq", "GPTQ", ""), ("awq", "AWQ", "text_config."))),
]

WEIGHT_FILES = [
    ("none", weights(None), WEIGHTS, "copy it again"),
    ("empty", weights(b""), WEIGHTS, "empty"),
    ("cut", weights(lambda data: data[:-1000]), WEIGHTS, "truncated", "copy it again"),
    ("cut header", weights(lambda data: data[:500]), WEIGHTS, "truncated within its header"),
    ("damaged header", weights(lambda data: data[:8] + b"?" + data[9:]), WEIGHTS, "header is damaged"),
    ("git-lfs pointer", weights(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    ("missing tensor", weights(tensors(lambda state: state.pop(NORM))), "missing tensors (1)", NORM),
    ("extra tensor", tensor("x", torch.ones(2)), "unexpected tensors (1)", "'x'"),
    ("wrong shape", tensor(NORM, torch.ones(2)), NORM, "[2]", "[160]"),
    ("whole numbers", tensor(NORM, torch.ones(160, dtype=torch.int8)), NORM, "I8", "bf16 checkpoint"),
    ("quantized", tensor(NORM + ".absmax", torch.ones(2)), "bitsandbytes (4 bits)", "quant_map"),
    ("missing shard", weights(None, index(*SHARDS), (SHARDS[0], b"")), "missing files (1)", SHARDS[1]),
    ("cut shard", weights(None, index(SHARDS[0]), (SHARDS[0], b"12345678")), SHARDS[0], "copy it again"),
    ("index not JSON", weights(None, (INDEX, b"?")), INDEX, "not readable as JSON"),
    ("index names no file", weights(None, index("x" * 300 + ".safetensors")), "cannot be read", "too long"),
    ("index leads away", weights(None, index("../x.safetensors")), "'../x.safetensors'", "same folder"),
]

TEMPLATE, STOPS, PIXELS = "chat_template.jinja", "generation_config.json", "preprocessor_config.json"
BASE = STOPS, entry_of_json("eos_token_id", 633)
RUNAWAY = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
PANIC = {"type": "Precompiled", "precompiled_charsmap": ""}
LATER = {"type": "FixedLength", "length": 0}
TEXT_SIDE = [
    ("no tokenizer", model(("tokenizer.json", None)), "tokenizer.json", "No such file"),
    ("cut tokenizer", model(("tokenizer.json", lambda data: data[:-9])), "tokenizer.json", "not readable"),
    ("no image token", model(("tokenizer.json", lambda data: data.replace(b"<|image|>", b"<|x|>"))),
     "lacks the special token <|image|>", "another model"),
    ("tokenizer of other numbers", config("image_token_index", 641), "token 640", "image_token_index 641"),
    ("settings not JSON", model(("tokenizer_config.json", b"{")), "tokenizer_config.json", "not readable"),
    ("stop tokens words", model((STOPS, entry_of_json("eos_token_id", "end"))), STOPS, "'end'"),
    ("broken template", model((TEMPLATE, b"{% for %}")), TEMPLATE, "does not parse"),
    ("failing template", model((TEMPLATE, b"{{ 1 / 0 }}")), "chat template", "division by zero"),
    ("template for two", model((TEMPLATE, b"<|image|>")), "writes 1 <|image|> for 0 images"),
    ("template without end", model((TEMPLATE, RUNAWAY)), "chat template", "it takes more than", "steps"),
    ("template that drops text", model((TEMPLATE, b"Hi")), "user message says, 'What is a star?'", TEMPLATE),
    ("template of half a pair", model((TEMPLATE, b"{{ '\\ud800' }}")), TEMPLATE, "not valid Unicode"),
    ("settings deeper than Python", model(("tokenizer_config.json", b"[" * 9999)), "not readable as JSON"),
    ("stop token without end", model((STOPS, b'{"eos_token_id": 1e400}')), STOPS, "not inf"),
    ("stop token of another model", model((STOPS, entry_of_json("eos_token_id", 5000))), STOPS, "below 648"),
    ("tokenizer that panics", model(("tokenizer.json", entry_of_json("normalizer", PANIC))), "Precompiled"),
    ("tokenizer that panics later", model(("tokenizer.json", entry_of_json("pre_tokenizer", LATER))),
     "the prompt cannot be tokenised", "chunk size"),
    ("system and base model", model(BASE, also=("--system", "x", *QUESTION)), "base model", "system message"),
    ("preprocessor not JSON", model((PIXELS, b"{")), PIXELS, "not readable as JSON"),
    ("other tile size", preprocessor("size", {"height": 560, "width": 560}), "560", "image_size is 112"),
    ("too many tiles", preprocessor("max_image_tiles", 9), "max_image_tiles is 9"),
    ("two colours", preprocessor("image_mean", [0.5, 0.5]), "image_mean", "three numbers"),
    ("infinite pixels", preprocessor("image_std", [1e-50, 1, 1]), PIXELS, "image_std", "not finite"),
]
