"""Meta's own checkpoint files in the official layout, which everything here reads.

    python -m weights.from_meta FOLDER OUT          FOLDER: consolidated.*.pth, params.json, tokenizer.model

11B comes in one .pth, 90B in eight. OUT gets safetensors files, config.json, and what the text and the images
need; it is written whole or not at all. Tensors are made one at a time from memory-mapped files, so memory
holds about one, and no code in a .pth is run. Whether a model answers or continues texts is in none of Meta's
files: --base says that it is not an Instruct model.
"""
import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from weights.config_file import config_from_dict
from weights.files import check_room, exists, new_folder
from weights.messages import named, one_line, quoted, written
from weights.meta_files import PARAMS, open_ranks, read_params
from weights.meta_layout import Converted, config, convert
from weights.meta_tokenizer import read_ranks, special_tokens, tokenizer_json
from weights.safetensors_file import INDEX, SINGLE, write_in_turn
from weights.save import official_state_dict
from weights.skeleton import without_weights

SHARD = 5_000_000_000               # bytes of a file, as the hub has them
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # CLIP's


def from_meta(folder: str | Path, out: str | Path, base: bool = False, shard: int = SHARD) -> Path:
    """Write OUT, a checkpoint in the official layout, from a folder of Meta's files; `shard` bytes a file.

    A `base` model continues texts: only `<|end_of_text|>` ends them, and it has no chat format.
    Without tokenizer.model there is no text side, and a tokenizer.json must be added. Raises ValueError with
    one line where files are missing, damaged or of another model, or where OUT is there already.
    """
    folder, out = Path(folder), Path(out)
    if not exists(folder / PARAMS) and exists(folder / "original" / PARAMS):
        folder = folder / "original"                    # as in Meta's repositories on the hub
    if exists(out):
        raise ValueError(f"{named(out)} is there already; name a folder that is not")
    params = read_params(folder)
    converted = convert(open_ranks(folder), params)
    like, settings = _checked(folder, converted, params)
    text = _text_side(folder, params, base)
    with new_folder(out) as partial:
        for name, content in {"config.json": settings, **text, **_image_side(params)}.items():
            content = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (partial / name).write_text(content, encoding="utf-8")
        _write(partial, converted, like, shard)
    return out


def _checked(folder: Path, converted: dict[str, Converted], params: dict) -> tuple[dict[str, Tensor], dict]:
    """Every parameter without values, and config.json, once names and shapes are those of the model."""
    try:
        like = {name: parameter.like() for name, parameter in converted.items()}
        settings = config(params, like)
        wanted = official_state_dict(without_weights(config_from_dict(settings)))
    except (RuntimeError, IndexError, TypeError, ZeroDivisionError) as error:   # shapes that do not fit
        raise ValueError(f"{named(folder)}: {PARAMS} and weights do not belong together "
                         f"({one_line(error, 120)})") from None
    except ValueError as error:
        raise ValueError(f"{named(folder)}: {error}") from None
    different = sorted(wanted.keys() ^ like.keys())
    if different:
        missing = different[0] in wanted
        raise ValueError(f"{named(folder)}: {len(different)} tensors are missing or too many, among them "
                         f"{quoted(different[0])}, which is {'missing' if missing else 'of no such model'}; "
                         f"{PARAMS} and weights do not belong together")
    for name, tensor in wanted.items():
        if like[name].shape != tensor.shape:
            raise ValueError(f"{named(folder)}: {quoted(name)} gets the shape {list(like[name].shape)}, "
                             f"where {PARAMS} asks for {list(tensor.shape)}; they do not belong together")
    return like, settings


# ---- files


def _write(folder: Path, converted: dict[str, Converted], like: dict[str, Tensor], most: int):
    """The weights, in files of about `most` bytes, with an index where there are several."""
    needed = sum(tensor.nbytes for tensor in like.values())
    check_room(folder, needed)
    shards = list(_shards(like, most))
    files = [SINGLE] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {}
    for file, names in zip(files, shards, strict=True):
        tensors = (converted[name].read() for name in names)
        write_in_turn(folder / file, {name: like[name] for name in names}, tensors)
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {(folder / file).stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    if len(shards) > 1:
        index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(like: dict[str, Tensor], most: int) -> Iterator[list[str]]:
    """Names in order, so many that a file has about `most` bytes."""
    names, size = [], 0
    for name, tensor in like.items():
        if names and size + tensor.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _text_side(folder: Path, params: dict, base: bool) -> dict[str, object]:
    """The files of the tokenizer, by their names; no tokenizer.model, none."""
    path = folder / "tokenizer.model"
    if not exists(path):
        print(f"{named(path)}: not there, so OUT gets no tokenizer.json: add one to ask questions",
              file=sys.stderr)
        return {}
    ranks = read_ranks(path, params["vocab_size"])
    special = special_tokens(len(ranks))
    stops = [special[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")[:1 if base else 3]]
    sampling = {} if base else {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return {"tokenizer.json": tokenizer_json(ranks),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                      "bos_token": "<|begin_of_text|>",
                                      "eos_token": "<|end_of_text|>" if base else "<|eot_id|>",
                                      "pad_token": "<|finetune_right_pad_id|>"},
            "generation_config.json": {"bos_token_id": special["<|begin_of_text|>"], "eos_token_id": stops,
                                       "pad_token_id": special["<|finetune_right_pad_id|>"], **sampling}}


def _image_side(params: dict) -> dict[str, object]:
    side = params["vision_chunk_size"]
    return {"preprocessor_config.json": {
        "image_processor_type": "MllamaImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "do_pad": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 2,
        "max_image_tiles": params["vision_max_num_chunks"], "size": {"height": side, "width": side},
        "image_mean": MEAN, "image_std": DEVIATION}}


# ---- the program


def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m weights.from_meta", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", help="consolidated.*.pth, params.json, tokenizer.model")
    parser.add_argument("out", metavar="OUT", help="a new folder for safetensors and config.json")
    parser.add_argument("--base", action="store_true", help="not an Instruct model: it continues texts")
    args = parser.parse_args(words)
    print(written(parser, args.out, lambda: from_meta(args.folder, args.out, args.base)))


if __name__ == "__main__":
    main()
