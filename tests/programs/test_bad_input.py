"""Bad input of every kind: one line on stderr that says what is wrong, exit code 2, and nothing else.

The table has images, flags, prompts and checkpoints. A row is a name, a function that prepares the case on
a `Bench` and returns the command line, and what the line must say. Broken checkpoints are the bundled one
with one file damaged. All runs in this process, through `main()`, which is all that `python generate.py`
does; the hub is never asked, its answers are imitated. Some rows are about `evaluate.py` and `benchmark.py`.
"""
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, errors
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import benchmark
import evaluate
import generate

TINY = Path(__file__).parents[2] / "weights" / "tiny"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "language_model.model.norm.weight"
QUESTION = "--prompt", "What is a star?"


class Bench:
    """Where a row is prepared: a folder for its files, the standard input, and what is imitated."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch = folder, patch
        self.stdin, self.terminal = b"", False      # None: closed
        self.program = generate

    def path(self, name: str, content: bytes | None = None) -> str:
        """Where the file `name` is, which is written first if it has a content."""
        if content is not None:
            (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def checkpoint(self, *files: tuple[str, bytes | None | Callable[[bytes], bytes]]) -> str:
        """The bundled checkpoint with some files written, removed (None) or changed (a function)."""
        folder = self.folder / "checkpoint"
        folder.mkdir()
        for file in TINY.iterdir():
            (folder / file.name).symlink_to(file)
        for name, change in files:
            path = folder / name
            content = change(path.read_bytes()) if callable(change) else change
            path.unlink(missing_ok=True)            # the link, never what it points to
            if content is not None:
                path.write_bytes(content)
        return str(folder)


Prepare = Callable[[Bench], list[str]]


def flags(*args: str) -> Prepare:
    """A good question with these flags."""
    return lambda bench: [*args, *QUESTION]


def bare(*args: str) -> Prepare:
    """These arguments and no more."""
    return lambda bench: [*args]


def of(program: ModuleType, *args: str) -> Prepare:
    """These arguments of another program."""
    def prepare(bench: Bench) -> list[str]:
        bench.program = program
        return [*args]
    return prepare


def in_folder(*args: str, name: str = "", content: bytes | None = None,
              program: ModuleType = generate) -> Prepare:
    """Arguments in which HERE is the row's folder, and IMAGE an image in it; `name` is one more file."""
    def prepare(bench: Bench) -> list[str]:
        bench.program = program
        image = bench.path("good.png", drawn("PNG"))
        if content is not None:
            bench.path(name, content)
        return [arg.replace("IMAGE", image).replace("HERE", str(bench.folder)) for arg in args]
    return prepare


def with_pipe(name: str, prepare: Prepare) -> Prepare:
    """With a named pipe in the row's folder."""
    def prepared(bench: Bench) -> list[str]:
        os.mkfifo(bench.path(name))
        return prepare(bench)
    return prepared


def without_permission(prepare: Prepare) -> Prepare:
    """Where nothing can be written; root, who may everything, is told so too."""
    def prepared(bench: Bench) -> list[str]:
        args = prepare(bench)
        bench.patch.setattr(os, "access", lambda path, mode, **named: False)
        return args
    return prepared


def image(name: str, content: bytes | None = None) -> Prepare:
    """A question about the image file `name`, which is written first if it has a content."""
    return lambda bench: ["--image", bench.path(name, content), *QUESTION]


def piped(content: bytes | None, image: bool = False) -> Prepare:
    def prepare(bench: Bench) -> list[str]:
        bench.stdin = content
        return ["--image", bench.path("good.png", drawn("PNG"))] if image else []
    return prepare


def typed(*args: str) -> Prepare:
    def prepare(bench: Bench) -> list[str]:
        bench.terminal = True
        return [*args]
    return prepare


def model(*files: tuple, also: tuple[str, ...] = QUESTION) -> Prepare:
    """A question to a damaged checkpoint; see `Bench.checkpoint`."""
    return lambda bench: ["--model", bench.checkpoint(*files), *also]


def config(entry: str, value: object) -> Prepare:
    return model(("config.json", entry_of_json(entry, value)))


def preprocessor(entry: str, value: object) -> Prepare:
    return model(("preprocessor_config.json", entry_of_json(entry, value)))


def weights(change: bytes | None | Callable[[bytes], bytes], *files: tuple[str, bytes]) -> Prepare:
    return model((WEIGHTS, change), *files)


def folder_of(*files: str) -> Prepare:
    """A question to a folder with nothing but these empty files in it."""
    def prepare(bench: Bench) -> list[str]:
        Path(bench.path("folder")).mkdir()
        for name in files:
            bench.path(f"folder/{name}", b"")
        return ["--model", bench.path("folder"), *QUESTION]
    return prepare


def hub(*args: str, error: Callable[[], Exception] | None = None) -> Prepare:
    """A question to a hub id; the hub answers with an error, or is not asked at all."""
    def prepare(bench: Bench) -> list[str]:
        def download(repo, revision, allow_patterns, ignore_patterns):
            raise error()

        if error is not None:
            bench.patch.setattr("weights.hub.snapshot_download", download)
        return ["--model", "owner/name", *args, *QUESTION]
    return prepare


def no_revision() -> Exception:
    reply = SimpleNamespace(status_code=404, headers={}, request=None)
    return errors.RevisionNotFoundError("404 Client Error.\n\nRevision Not Found", response=reply)


def drawn(form: str, mode: str = "RGB", colour: str | float = "red") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (60, 40), colour).save(file, form)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b""):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def entry_of_json(entry: str, value: object) -> Callable[[bytes], bytes]:
    """Sets one entry of a JSON file, "a.b" being entry b of object a."""
    def change(data: bytes) -> bytes:
        inside = content = json.loads(data)
        *outer, last = entry.split(".")
        for key in outer:
            inside = inside[key]
        inside[last] = value
        return json.dumps(content).encode()
    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    """Changes the tensors of a safetensors file."""
    def changed(data: bytes) -> bytes:
        state = load_tensors(data)
        change(state)
        return save_tensors(state)
    return changed


def tensor(name: str, value: torch.Tensor) -> Prepare:
    return weights(tensors(lambda state: state.update({name: value})))


def index(*files: str) -> tuple[str, bytes]:
    return INDEX, json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}).encode()


IMAGES = [
    ("missing", image("none.png"), "none.png", "no such file"),
    ("a folder", image("."), "a folder; name one image"),
    ("empty", image("e.png", b""), "e.png: empty"),
    ("no path", flags("--image", ""), "image"),
    ("a text", image("notes.txt", b"a red star\n"), "notes.txt: not an image", "PNG"),
    ("a text called png", image("notes.png", b"a red star\n"), "notes.png: not an image"),
    ("SVG", image("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "x.svg: not an image"),
    ("PDF", image("x.pdf", b"%PDF-1.7\n%%EOF"), "x.pdf: not an image"),
    ("EPS", image("x.eps", drawn("EPS")), "x.eps: not an image", "PNG, JPEG"),
    ("TGA", image("x.tga", drawn("TGA")), "x.tga: not an image", "PNG, JPEG"),
    ("signature only", image("s.png", drawn("PNG")[:8]), "s.png: "),
    ("cut PNG", image("c.png", drawn("PNG")[:60]), "c.png: damaged", "save it again"),
    ("cut JPEG", image("c.jpg", drawn("JPEG")[:-100]), "c.jpg: damaged", "save it again"),
    ("cut WebP", image("c.webp", drawn("WEBP")[:-10]), "c.webp: "),
    ("bomb", image("bomb.png", png_of_size(60000, 60000)), "bomb.png: over", "pixels"),
    ("strip", image("strip.png", png_of_size(1, 89_000_000)), "strip.png: 1 x 89000000 pixels", "2 GiB"),
    ("no pixels", image("n.png", png_of_size(0, 4)), "n.png: "),
    ("NaN pixels", image("n.tif", drawn("TIFF", "F", float("nan"))), "n.tif: ", "NaN"),
    ("NUL in the path", image("a\0b.png"), "null"),
    ("a device", image("/dev/zero"), "/dev/zero: a pipe, a socket or a device", "save the image as a file"),
    ("a URL", flags("--image", "https://example.org/a.png"), "a URL", "download it first"),
    ("a data URI", flags("--image", "data:image/png;base64,iVBO"), "a data URI", "a path"),
    ("base64", flags("--image", "iVBORw0KGgo" + "A" * 262_000), "base64 text", "a path"),
    ("a long name", flags("--image", "x" * 300), "xxx: cannot be read", "check the path"),
    ("a name that is not UTF-8", flags("--image", "caf\udce9.png"), "caf\\udce9.png: no such file"),
    ("line break in the path", image("a\nb.png"), "no such file"),
    ("second", lambda b: [*piped(b"", image=True)(b), *image("b.png")(b)], "b.png: no such file"),
]

LENGTH, HEAT, MASS = "--max-new-tokens", "--temperature", "--top-p"
FLAGS = [
    ("unknown flag", bare("--imagine", "x.png"), "--imagine"),
    ("stray word", bare("x.png"), "x.png"),
    ("ambiguous flag", bare("--d", "cpu"), "--d", "--device", "--dtype"),
    ("prompt without value", bare("--prompt"), "--prompt", "expected one argument"),
    ("image without value", bare("--image", "--json"), "--image", "expected one argument"),
    ("json with value", flags("--json=yes"), "--json"),
    ("length not a number", flags(LENGTH, "many"), LENGTH, "'many'"),
    ("length not whole", flags(LENGTH, "2.5"), LENGTH, "'2.5'"),
    ("length 0", flags(LENGTH, "0"), f"{LENGTH} is 0", "at least 1"),
    ("length below 0", flags(LENGTH, "-3"), f"{LENGTH} is -3", "at least 1"),
    ("length beyond the context", flags(LENGTH, "100000"), "100000", "context holds 2048", "fewer"),
    ("length beyond 64 bits", flags(LENGTH, "1" * 30), "1" * 30, "context holds 2048"),
    ("temperature not a number", flags(HEAT, "hot"), HEAT, "'hot'"),
    ("temperature below 0", flags(HEAT, "-0.5"), "temperature is -0.5", "0 (greedy)"),
    ("temperature NaN", flags(HEAT, "nan"), "temperature is nan"),
    ("temperature infinite", flags(HEAT, "inf"), "temperature is inf"),
    ("top-p 0", flags(MASS, "0"), "top-p is 0.0", "at most 1"),
    ("top-p below 0", flags(MASS, "-0.1"), "top-p is -0.1"),
    ("top-p above 1", flags(MASS, "1.1"), "top-p is 1.1", "at most 1"),
    ("top-p NaN", flags(MASS, "nan"), "top-p is nan"),
    ("seed not whole", flags("--seed", "1.5"), "--seed", "'1.5'"),
    ("seed beyond 64 bits", flags("--seed", "9" * 20, HEAT, "1"), "seed", "9" * 20),
    ("unknown device", flags("--device", "abacus"), "'abacus'", "use cpu, cuda"),
    ("no device", flags("--device", ""), "device", "use cpu, cuda"),
    ("unsupported device", flags("--device", "meta"), "'meta'", "use cpu, cuda"),
    ("device before download", hub("--device", "abacus", error=no_revision), "'abacus'", "use cpu, cuda"),
    ("no CUDA", flags("--device", "cuda"), "no CUDA GPU", "use device cpu"),
    ("unknown dtype", flags("--dtype", "int4"), "'int4'", "bf16", "fp32"),
    ("dtype before download", hub("--dtype", "int4", error=no_revision), "'int4'", "bf16", "fp32"),
    ("JSON chat", typed("--json"), "--json", "--prompt"),
]

STARS = "star " * 3000
DATED = "chat_template.jinja", b"{{ date_string }}"
PROMPTS = [
    ("empty", bare("--prompt", ""), "prompt is empty"),
    ("only blanks", bare("--prompt", " \t\n"), "prompt is empty"),
    ("second empty", flags("--prompt", ""), "prompt is empty"),
    ("nothing piped", piped(b""), "--prompt", "--image"),
    ("blanks piped", piped(b" \n\n"), "--prompt", "--image"),
    ("input closed", piped(None), "--prompt", "--image"),
    ("not UTF-8", bare("--prompt", "caf\udce9"), "not valid Unicode", "UTF-8"),
    ("not UTF-8, piped", piped(b"caf\xe9?"), "standard input", "UTF-8"),
    ("system not UTF-8", flags("--system", "caf\udce9"), "system message", "UTF-8"),
    ("date not UTF-8", model(DATED, also=(*QUESTION, "--date", "\udce9")), "date", "UTF-8"),
    ("too long", bare("--prompt", STARS), "prompt tokens", "context holds 2048", "shorten"),
    ("too long, piped", piped(STARS.encode(), image=True), "context holds 2048"),
    ("too long, second", flags("--prompt", STARS), "context holds 2048"),
    ("too long with the answer", bare("--prompt", STARS[:9500]), "and 256 new ones", "context holds 2048"),
]


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
    ("adapter", folder_of("adapter_config.json", "adapter_model.safetensors"), "LoRA", "merged"),
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
    *((method, config(f"{section}quantization_config", {"quant_method": method}), f"quantized ({method})",
       "bf16 checkpoint")
      for method, section in (("bitsandbytes", ""), ("gptq", ""), ("compressed-tensors", "text_config."))),
]

WEIGHT_FILES = [
    ("none", weights(None), WEIGHTS, "download"),
    ("empty", weights(b""), WEIGHTS, "empty"),
    ("cut", weights(lambda data: data[:-1000]), WEIGHTS, "truncated", "download"),
    ("cut header", weights(lambda data: data[:500]), WEIGHTS, "truncated within its header"),
    ("damaged header", weights(lambda data: data[:8] + b"?" + data[9:]), WEIGHTS, "header is damaged"),
    ("git-lfs pointer", weights(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    ("missing tensor", weights(tensors(lambda state: state.pop(NORM))), "missing tensors (1)", NORM),
    ("extra tensor", tensor("x", torch.ones(2)), "unexpected tensors (1)", "'x'"),
    ("wrong shape", tensor(NORM, torch.ones(2)), NORM, "[2]", "[160]"),
    ("whole numbers", tensor(NORM, torch.ones(160, dtype=torch.int8)), NORM, "I8", "bf16 checkpoint"),
    ("quantized", tensor(NORM + ".absmax", torch.ones(2)), "bitsandbytes 4-bit", "bf16 checkpoint"),
    ("missing shard", weights(None, index(*SHARDS), (SHARDS[0], b"")), "missing files (1)", SHARDS[1]),
    ("cut shard", weights(None, index(SHARDS[0]), (SHARDS[0], b"12345678")), SHARDS[0], "download"),
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

def method(content: str, named: str = "Mine") -> Prepare:
    """A class in a file as the pruning method."""
    return lambda bench: ["--prune", bench.path("mine.py", content.encode()) + ":" + named, *QUESTION]


PRUNING = [
    ("unknown method", flags("--prune", "fast"), "'fast'", "trimmed_llama, fastv, elastic", "mine.py:Mine"),
    ("no such guide", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION, "--prune",
                                     "sgl", "--set", "guide=./none"], "'./none'", "nor a folder here"),
    ("no such compressor", flags("--prune", "quecc", "--set", "weights=here"), "quecc", "'here'", "folder"),
    ("empty blocks", flags("--prune", "attention_predictor", "--set", "block=0"), "block is 0", "at least"),
    ("more layers choose than there are", lambda bench: [
        "--image", bench.path("good.png", drawn("PNG")), *QUESTION, "--prune", "mint", "--set", "n_sel=9"],
     "n_sel is 9", "1 to 3"),
    ("a mass above all", flags("--prune", "zipvl", "--set", "tau=2"), "tau is 2", "at most 1"),
    ("nothing observed", flags("--prune", "csp", "--set", "observed=0"), "observed is 0", "above 0"),
    ("no method", flags("--keep", "0.5"), "--prune"),
    ("option without a method", flags("--set", "seed=1"), "--prune"),
    ("keep nothing", flags("--prune", "random", "--keep", "0"), "keep is 0", "at least 1"),
    ("keep too much", flags("--prune", "random", "--keep", "1.5"), "keep is 1.5", "at most 1.0"),
    ("keep a word", flags("--prune", "random", "--keep", "half"), "keep is 'half'", "a number"),
    ("keep not a number", flags("--prune", "random", "--keep", "nan"), "keep is nan", "a number"),
    ("whole tiles", flags("--prune", "downsample", "--keep", "7"), "keep is 7", "fraction", "tiles"),
    ("unknown option", flags("--prune", "fastv", "--set", "depth=3"), "no option 'depth'", "full_layers"),
    ("bad value", flags("--prune", "fastv", "--set", "positions=some"), "positions is 'some'", "last or all"),
    ("bad type", flags("--prune", "fastv", "--set", "full_layers=x"), "full_layers is 'x'", "whole number"),
    ("no value", flags("--prune", "fastv", "--set", "rows"), "'rows'", "option=value"),
    ("bad hook", flags("--prune", "random", "--set", "when=step"), "when is 'step'", "prefill or boundary"),
    ("too many layers", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION, "--prune",
                                       "fastv", "--set", "full_layers=9"], "full_layers is 9", "0 to 3"),
    ("no such file", flags("--prune", "nowhere.py:Mine"), "nowhere.py", "no such file"),
    ("no class", method("x = 1"), "no class 'Mine'"),
    ("no pruner", method("class Mine: pass"), "'Mine'", "Pruner"),
    ("no name", method("x = 1", ""), "no class ''"),
    ("syntax", method("class Mine("), "mine.py", "SyntaxError"),
    ("fails", method("import nowhere_at_all"), "mine.py", "nowhere_at_all"),
    ("map of two answers", flags("--prompt", "What?", "--save-map", "x.png"), "--save-map", "one --prompt"),
    ("map of no image", flags("--save-map", "x.png"), "--save-map", "--image"),
    ("map of no kind", flags("--map", "lens"), "invalid choice", "attention"),
    ("map of odd format", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION,
                                         "--save-map", "x.docx"], "x.docx", ".png"),
    ("map into nowhere", lambda bench: ["--image", bench.path("good.png", drawn("PNG")), *QUESTION,
                                        "--save-map", "nowhere/x.png"], "nowhere/x.png", "folder"),
    ("a file alone", flags("--prune", "mine.py"), "'mine.py'", "mine.py:Mine"),
]

LONG, DIGITS = "x" * 300, "1" * 401
MAP = "--image", "IMAGE", *QUESTION, "--save-map"
RANDOM, SGL, QUECC = ("--prune", "random"), ("--prune", "sgl"), ("--prune", "quecc")
ONE = "--questions", "1", "--json", "HERE/x.json"
NUMBERS = [
    ("length beyond all size", flags(f"{LENGTH}={DIGITS}"), LENGTH, "too large"),
    ("length below all size", flags(f"{LENGTH}=-{DIGITS}"), LENGTH, "too large"),
    ("length of 5000 digits", flags(f"{LENGTH}={'1' * 5000}"), LENGTH, "too large"),
    ("length NaN", flags(LENGTH, "nan"), LENGTH, "'nan'", "whole number"),
    ("length in floating point", flags(LENGTH, "1e3"), LENGTH, "'1e3'", "whole number"),
    ("temperature beyond all size", flags(HEAT, "1e400"), "temperature is inf"),
    ("temperature of 401 digits", flags(HEAT, DIGITS), "temperature is inf"),
    ("temperature below all size", flags(f"{HEAT}=-inf"), "temperature is -inf"),
    ("top-p infinite", flags(MASS, "inf"), "top-p is inf"),
    ("seed beyond all size", flags("--seed", DIGITS), "--seed", "too large"),
    ("seed NaN", flags("--seed", "nan"), "--seed", "'nan'", "whole number"),
    ("keep beyond all size", flags(*RANDOM, "--keep", DIGITS), "too large a number", "at most 9"),
    ("keep beyond 64 bits", flags(*RANDOM, "--keep", "1" + "0" * 25), "too large a number"),
    ("keep of 5000 digits", flags(*RANDOM, "--keep", "1" * 5000), "keep is inf"),
    ("keep infinite", flags(*RANDOM, "--keep", "1e400"), "keep is inf", "a number"),
    ("keep 1e25", flags(*RANDOM, "--keep", "1e25"), "keep is 1e+25", "fraction"),
    ("option beyond all size", flags(*RANDOM, "--set", f"seed={DIGITS}"), "too large a number"),
    ("option beyond 64 bits", flags(*SGL, "--set", f"threshold={10 ** 25}"), "too large a number"),
    ("questions of 401 digits", of(evaluate, "--questions", DIGITS), "--questions", "too large"),
    ("questions beyond reason", of(evaluate, "--questions", "1" + "0" * 12), "at most 1000000"),
    ("questions below 0", of(evaluate, "--questions", "-3"), "--questions is -3", "at least 1"),
    ("questions not whole", of(evaluate, "--questions", "1.5"), "--questions", "'1.5'"),
    *((f"questions {value}", of(evaluate, f"--questions={value}"), "--questions", repr(value), "whole number")
      for value in ("nan", "inf", "1e400", "")),
    *((f"blur {value}", of(evaluate, f"--blur={value}"), f"--blur is {float(value)}", "0 or more pixels")
      for value in ("nan", "inf", "-inf", "1e400", "-1", "1e25", "1001")),
    ("blur of 401 digits", of(evaluate, "--blur", DIGITS), "--blur is inf"),
    ("blur a word", of(evaluate, "--blur", "much"), "--blur", "'much'"),
    ("layer of 401 digits", of(evaluate, "--skip-layer", DIGITS), "--skip-layer", "too large"),
    ("keeps, one too large", of(evaluate, *RANDOM, "--keep", f"0.5,{10 ** 25}"), "too large a number"),
    ("rounds of 401 digits", of(benchmark, "--repeat", DIGITS), "--repeat", "too large"),
    ("batches, one no number", of(benchmark, "--batch", "1,two"), "--batch", "'two'"),
    ("tiles of 401 digits", of(benchmark, "--tiles", DIGITS), "--tiles", "too large"),
]

OUTPUTS = [
    ("map over its image", in_folder(*MAP, "IMAGE"), "good.png", "this is the image"),
    ("map over its image, spelt otherwise", in_folder(*MAP, "HERE/./good.png"), "this is the image"),
    ("map on a pipe", with_pipe("map.png", in_folder(*MAP, "HERE/map.png")), "map.png", "not a file"),
    ("map on a folder", in_folder(*MAP, "HERE/checkpoint.png/x.png"), "no folder", "create it"),
    ("map in a file", in_folder(*MAP, "HERE/a.png/x.png", name="a.png", content=b""), "no folder"),
    ("map of 300 letters", in_folder(*MAP, f"HERE/{LONG}.png"), "File name too long", "another name"),
    ("map without permission", without_permission(in_folder(*MAP, "HERE/x.png")), "nothing can be written"),
    ("map over a protected file",
     without_permission(in_folder(*MAP, "HERE/x.png", name="x.png", content=b"")), "write-protected"),
    ("JSON on a device", of(evaluate, "--json", "/dev/null"), "--json /dev/null", "not a file"),
    ("JSON on a folder", in_folder("--json", "HERE", program=evaluate), "--json", "not a file"),
    ("JSON of 300 letters", in_folder("--json", f"HERE/{LONG}", program=evaluate), "File name too long"),
    ("JSON of 252 letters", in_folder("--questions", "1", "--json", f"HERE/{LONG[:252]}", program=evaluate),
     ".part", "File name too long"),
    ("JSON without permission", without_permission(in_folder("--json", "HERE/x", program=evaluate)),
     "nothing can be written"),
    ("JSON and plot in one file", in_folder(*RANDOM, "--json", "HERE/x.png", "--plot", "HERE/./x.png",
                                            program=evaluate), "same file", "two names"),
    ("plot of 300 letters", in_folder(*RANDOM, "--plot", f"HERE/{LONG}.png", program=evaluate), "too long"),
    ("plot without permission",
     without_permission(in_folder(*RANDOM, "--plot", "HERE/x.png", program=evaluate)),
     "nothing can be written"),
    ("part on a pipe", with_pipe("x.json.part", in_folder(*ONE, program=evaluate)), "part", "not a file"),
    ("part of something else", in_folder(*ONE, name="x.json.part", content=b"mine\n", program=evaluate),
     "x.json.part", "delete this file"),
    ("figures on a device", of(benchmark, "--json", "/dev/null"), "--json /dev/null", "not a file"),
    ("figures of 300 letters", in_folder("--json", f"HERE/{LONG}", program=benchmark), "File name too long"),
    ("drawing of 300 letters", in_folder("--plot", f"HERE/{LONG}.png", program=benchmark), "name too long"),
    ("drawing without permission", without_permission(in_folder("--plot", "HERE/x.png", program=benchmark)),
     "nothing can be written"),
]

NAMES = [
    ("model of 300 letters", flags("--model", LONG), "neither 'tiny'"),
    ("model of 5000 letters", flags("--model", "x" * 5000), "neither 'tiny'"),
    ("image of 300 letters", flags("--image", LONG), "name too long"),
    ("method of 5000 letters", flags("--prune", "x" * 5000), "choose one of none", "mine.py:Mine"),
    ("file of 300 letters", flags("--prune", f"{LONG}.py:Mine"), "File name too long", "mine.py:Mine"),
    ("class of 5000 letters", method("x = 1", "X" * 5000), "no class", "Pruner"),
    ("option of 5000 letters", flags(*RANDOM, "--set", f"{'x' * 5000}=1"), "no option", "keep: a number"),
    ("value of 5000 letters", flags(*RANDOM, "--set", "when=" + "x" * 5000), "must be prefill or"),
    ("setting of 5000 letters", flags(*RANDOM, "--set", "x" * 5000), "option=value"),
    ("weights of 300 letters", flags(*QUECC, "--set", f"weights={LONG}"), "File name too long"),
    ("guide of 300 letters", in_folder("--image", "IMAGE", *QUESTION, *SGL, "--set", f"guide={LONG}"),
     "nor a folder here"),
    ("device of 5000 letters", flags("--device", "x" * 5000), "use cpu, cuda"),
    ("dtype of 5000 letters", flags("--dtype", "x" * 5000), "bf16", "fp32"),
    ("flag of 5000 letters", bare("--" + "x" * 5000), "unrecognized arguments"),
    ("kind of 5000 letters", of(evaluate, "--kinds", "x" * 5000), "no question is of kind", "colour"),
    ("methods of 5000 letters", of(evaluate, "--prune", "x" * 5000), "choose one of none"),
    ("setting of methods", of(evaluate, *RANDOM, "--set", "x" * 5000), "option=value"),
    ("weights of methods", of(evaluate, *QUECC, "--set", f"quecc.weights={LONG}"), "File name too long"),
]

KINDS = {"pruning": PRUNING, "image": IMAGES, "flag": FLAGS, "prompt": PROMPTS, "checkpoint": PLACES,
         "config": CONFIGS, "weights": WEIGHT_FILES, "text": TEXT_SIDE, "number": NUMBERS, "output": OUTPUTS,
         "name": NAMES}
ROWS = {f"{kind}: {name}": row for kind, rows in KINDS.items() for name, *row in rows}


def test_the_table_is_long_and_names_nothing_twice():
    assert len(ROWS) == sum(map(len, KINDS.values())) >= 100


class Input(io.TextIOWrapper):
    """Standard input of given bytes, or a terminal at which nobody types."""

    def __init__(self, content: bytes, terminal: bool):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything under a folder, with its size and time of change."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_gets_one_line(row, tmp_path, monkeypatch, capsys):
    prepare, *words = ROWS[row]
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", *prepare(bench)])
    stdin = None if bench.stdin is None else Input(bench.stdin, bench.terminal)
    monkeypatch.setattr(sys, "stdin", stdin)
    before = tree(tmp_path)

    with pytest.raises(SystemExit) as caught:
        bench.program.main()

    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert len(err) <= 1010
    for word in words:
        assert word in err
    assert tree(tmp_path) == before
