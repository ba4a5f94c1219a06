"""What the programs share on the command line: arguments, files to write, --prune, sampling, prompts.

How a program starts and ends, and how an error becomes one line, is in program.py; the parser and the pages
of help are in arguments.py; how answers are printed is in answers.py, and the chat in chat.py.
"""
import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from PIL import Image

from cli.arguments import Parser
from cli.program import processes
from cli.terminal import Progress, say_wrapped
from model.llama_vision import LlamaVision
from model.sampling import Sampler
from pruning import METHODS, Pruner, find, hooks, load, options
from pruning.options import MOST as MOST_OPTION
from pruning.visualize import MAP_SUFFIXES
from weights.adapter_file import said_bases
from weights.files import replacing
from weights.generation_config import read_sampling
from weights.image_source import images_from, is_path
from weights.messages import named, quoted, reason
from weights.quantized_layers import weights_words
from weights.wide import wide_words

# ----- arguments


def add_model_options(parser: Parser, default: str | None = "tiny"):
    """Which model, and where it computes: for every program that loads one."""
    parser.section("the model")
    parser.add_argument("--model", default=default, metavar="M",
                        help=f"'tiny' (bundled{', the default' * bool(default)}), a folder, or a hub id")
    parser.add_rare("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_rare("--adapter", action="append", default=[], metavar="A",
                    help="merge a LoRA adapter into it, a folder or hub id; several in their order")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, or several: cuda:0,cuda:1")
    parser.add_argument("--dtype", metavar="T", help="bf16, fp16, fp32; default: the checkpoint's own")
    parser.add_argument("--quantize", metavar="Q",
                        help="fewer bits: int8 or int4; with +tower also the tower")
    parser.add_rare("--offload", action="store_true", help="leave what a GPU cannot hold in the CPU's memory")


def model_options(args: argparse.Namespace) -> dict[str, object]:
    """What `add_model_options` has read, without the model itself, as arguments of Assistant."""
    return {"progress": Progress, "device": args.device, "dtype": args.dtype, "revision": args.revision,
            "adapters": args.adapter, "offload": args.offload, "quantize": args.quantize}


def say_how(model: LlamaVision, args: argparse.Namespace, adapters: list[str | Path]):
    """On stderr, what a model does otherwise on this machine, and which adapters name another base than it:
    that may be a copy of this one, or not."""
    together = f"{processes()} processes hold the model together; bytes and memory are those of the first"
    for words in together if processes() > 1 else None, weights_words(model), wide_words(model):
        if words is not None:
            say_wrapped(words)
    for adapter, base in zip(args.adapter, said_bases(adapters), strict=True):
        if base not in (None, args.model):
            say_wrapped(f"adapter {named(adapter)} merged into {named(args.model)}; it says that it was "
                        f"trained on {base}")


def whole_number(text: str) -> int:
    """The type of an argument."""
    try:
        number = int(text[:100])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number") from None
    if len(text) > 100:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is too large")
    return number


def real_number(text: str) -> float:
    """The type of an argument; what is not finite is left to whoever uses it."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number") from None


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...] = ()):
    """Raise ValueError for a file that could not be written, before hours of work; None is no file."""
    if path is None:
        return
    name = f"{option} {named(path)}"
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{name}: the name must end in {', '.join(suffixes)}")
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{name}: this is not a file; choose another name")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"{name}: there is no folder {named(path.parent)}; create it first")
    except OSError as error:
        raise ValueError(f"{name}: {reason(error)}; choose another name") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{name}: this file is write-protected; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: nothing can be written in this folder; choose another one")


def check_map(path: Path, images: list[str], prompts: int):
    """The same for --save-map, which draws over these images."""
    if prompts != 1 or not images:
        raise ValueError("--save-map draws one answer about an image: give --image and one --prompt")
    check_output("--save-map", path, MAP_SUFFIXES)
    if path.resolve() in [Path(image).resolve() for image in filter(is_path, images)]:
        raise ValueError(f"--save-map {named(path)}: this is the image; choose another name")


@contextmanager
def writing(option: str, path: Path) -> Iterator[Path]:
    """`replacing(path)`, with errors that name the option."""
    try:
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise ValueError(f"{option} {named(path)}: cannot be written: {reason(error)}") from None


# ----- --prune, --keep and --set


def parse_pruner(method: str | None, keep: str | None, settings: list[str]) -> Pruner | None:
    """What --prune, --keep and --set say, for one method; ValueError with one line for bad input."""
    chosen = dict(map(parse_option, settings))
    if keep is not None:
        chosen["keep"] = parse_number(keep)
    if method is None and chosen:
        raise ValueError("--keep and --set are options of a method: name it with --prune ('list' shows all)")
    return None if method is None else load(method, **chosen)


def parse_pruners(methods: str, keeps: list[str], settings: list[str]) -> list[Pruner]:
    """Every method of a list "a,b" (or "all") at every keep ratio.

    "a:option=value" in the list is a with an option of its own. `settings` are "method.option=value", or
    "option=value" for all methods that have this option. An option in the list wins over one of a method,
    and that over one for all. Raises ValueError with one line for bad input.
    """
    variants = parse_variants(methods)
    classes = {name: find(name) for name, _ in variants}
    if len({method.name for method in classes.values()}) < len(classes):
        raise ValueError(f"{quoted(methods)}: two methods have the same name")
    for_one, for_all = parse_settings(settings, list(classes.values()))
    numbers = [parse_number(keep) for keep in keeps]
    pruners = []
    seen = []
    for name, own in variants:
        shared = {option: value for option, value in for_all.items() if has_option(classes[name], option)}
        chosen = {**shared, **for_one[classes[name].name], **own}
        pruners += [load(name, keep=keep, **chosen) for keep in numbers]
        variant = pruners[-1].name, pruners[-1].options_set()
        if variant in seen:
            raise ValueError(f"{quoted(methods)}: {variant[0]} is there twice with the same options")
        seen.append(variant)
    return pruners


def parse_variants(methods: str) -> list[tuple[str, dict[str, object]]]:
    """The methods of a list, each with its own options: "a,b:x=1:y=2,mine.py:Mine:x=1"."""
    parts = []
    for part in methods.split(","):
        parts += [name for name in METHODS if name != Pruner.name] if part == "all" else [part]
    variants = []
    for part in dict.fromkeys(parts):
        name, colon, last = part.rpartition(":")
        own = []
        while colon and "=" in last:
            own.insert(0, parse_option(last))
            part = name
            name, colon, last = part.rpartition(":")
        if "keep" in dict(own):
            raise ValueError(f"{quoted(methods)}: --keep is for all methods")
        variants.append((part, dict(own)))
    return variants


def parse_settings(settings: list[str], methods: list[type[Pruner]]) -> tuple[dict[str, dict], dict]:
    """What --set says for each method by its name, and for all that have the option."""
    for_one = {method.name: {} for method in methods}
    for_all = {}
    for text in settings:
        where, value = parse_option(text)
        method, dot, option = where.rpartition(".")
        if option == "keep" or dot and method not in for_one:
            raise ValueError(f"--set {quoted(text)}: give it as option=value or method.option=value, of "
                             f"{', '.join(for_one)}; --keep is for all methods")
        if not dot and not any(has_option(method, option) for method in methods):
            raise ValueError(f"--set {quoted(text)}: none of {', '.join(for_one)} has this option")
        (for_one[method] if dot else for_all)[option] = value
    return for_one, for_all


def has_option(method: type[Pruner], option: str) -> bool:
    return option in {field.name for field in fields(method)}


def labelled(variants: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """What to call each method with these options, and the options that this does not tell.

    A label is the name, and what differs between several of the same name: "random", or "random seed=3".
    """
    labels = []
    for name, chosen in variants:
        others = [other for same, other in variants if same == name]
        common = {option: value for option, value in chosen.items()
                  if all(option in other and other[option] == value for other in others)}
        own = [f"{option}={value}" for option, value in chosen.items() if option not in common]
        labels.append((" ".join([name, *own]), common))
    return labels


def parse_option(text: str) -> tuple[str, object]:
    """"name=value": a number, true, false or none where it reads as one, else text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--set {quoted(text)}: give it as option=value")
    words = {"true": True, "false": False, "none": None}
    return name, words[value.lower()] if value.lower() in words else parse_number(value)


def parse_number(text: str) -> int | float | str:
    """A whole number, a number, or the text itself."""
    try:
        number = int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
    if abs(number) > MOST_OPTION:
        raise ValueError(f"{quoted(text)} is too large a number: give one of at most {MOST_OPTION}")
    return number


def catalogue() -> str:
    """Every method: what it does, its paper, its hooks and its options."""
    lines = []
    for name, method in METHODS.items():
        lines.append(f"{name}: {method.__doc__.splitlines()[0]}")
        if method.paper:
            lines.append(f"    paper: {method.paper}")
        lines.append(f"    acts at: {', '.join(hooks(method)) or 'no hook'}")
        lines += [f"    {option} = {what}" for option, what in options(method).items()]
    return "\n".join(lines) + "\n"


# ----- sampling, images and prompts


def add_sampling(parser: Parser):
    """The arguments of `parse_sampler`; None where one is not given."""
    rare = parser.add_rare
    parser.add_argument("--temperature", type=real_number, metavar="X", help="default 0: the likeliest token")
    rare("--sample", action="store_true", help="sample as the checkpoint suggests; default: greedy")
    rare("--top-p", type=real_number, metavar="X",
         help="sample among the likeliest of this mass; default 0.9")
    rare("--top-k", type=whole_number, metavar="N", help="sample among the N likeliest; default 0: all")
    rare("--repetition-penalty", type=real_number, metavar="X", help="above 1: repeat less; default 1")
    rare("--seed", type=whole_number, default=0, metavar="N", help="of sampling; default 0")


def parse_sampler(args: argparse.Namespace, checkpoint: Path | None = None) -> Sampler:
    """What the arguments say of sampling; with --sample and a checkpoint's folder, what they leave out is as
    its generation_config.json has it. Raises ValueError with one line."""
    given = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
             "repetition_penalty": args.repetition_penalty}
    given = {name: value for name, value in given.items() if value is not None}
    suggested = read_sampling(checkpoint) if args.sample and checkpoint is not None else {}
    return Sampler(**{**suggested, **given}, seed=args.seed)


def read_images(sources: list[str]) -> list[Image.Image]:
    """The images of paths, URLs, data URIs and "-"; ValueError with one line."""
    with Progress("waiting for the image"):
        return images_from(sources)


def piped_prompt(has_image: bool) -> str:
    """The prompt where none was given and nobody sits at a terminal."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read().strip()        # None: closed by the caller
    except UnicodeDecodeError:
        encoding = sys.stdin.encoding.upper()
        remedy = "" if encoding == "UTF-8" else "; if it is UTF-8, set PYTHONIOENCODING=utf-8"
        raise ValueError(f"the prompt on standard input is not valid {encoding} text{remedy}") from None
    if not text and not has_image:
        raise ValueError("nothing to answer: give --prompt TEXT, and --image PATH to ask about an image")
    return text or "Describe the picture."
