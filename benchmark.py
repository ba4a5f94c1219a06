"""How fast this is, part by part, beside transformers in the same process: `python benchmark.py`.

    for every number of tiles:      encode, project (projector and K/V of all cross-attention layers)
        for every batch:            prefill, first_token (encode + prefill), prune (a method's own work),
                                    decode (one token, sampled greedily), peak_memory, image_kv

What is compared runs in turns (ours, theirs, ours, theirs, ...) on the same weights and inputs, and decodes
with the same loop (`generate`). A figure is a median; ratio is theirs / ours: above 1 ours is better. Outputs
are compared too, with transformers' two deviations corrected for that alone. `--shape` makes random weights,
`--layers` a slice. How each part is measured: benchmarks/parts.py. The JSON has all of it; `--report` makes
the pages from such files.
"""
from cli import program

program.begin(__name__)

import argparse
import json
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import paper, tables
from benchmarks.masks import masks
from benchmarks.measure import ceilings, machine, times_in_turns
from benchmarks.methods import methods
from benchmarks.parts import EAGER, FULL, PEER, STATIC, Bench, Samples
from benchmarks.peer import Peer, import_transformers
from benchmarks.plot import plot
from benchmarks.quantized import Quantized
from benchmarks.subject import SHAPES, Subject, cut, grid_of, random_model
from benchmarks.table2 import of_complete, put_together
from benchmarks.text import text
from benchmarks.waterfall import waterfall
from benchmarks.whole import whole
from cli.options import (
    Parser,
    add_model_options,
    check_output,
    has_option,
    parse_pruner,
    parse_pruners,
    say_how,
    whole_number,
    writing,
)
from cli.terminal import Progress, stdout_width
from evaluation.plot import check_plot
from generate import generate
from model.llama_vision import check_length
from pruning import Pruner
from weights import load_model, parse_device, parse_dtype, read_config
from weights.adapter_file import find_adapters
from weights.adapters import find_base
from weights.messages import quoted
from weights.quantized_layers import check_quantize

ROOT = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
LARGEST = 2 ** 17           # of the numbers on the command line

EXAMPLES = ("python benchmark.py --model tiny --against transformers",
            "python benchmark.py --shape 11b --layers 8 --batch 1,4 --json figures.json")


def arguments() -> argparse.Namespace:
    parser = Parser("python benchmark.py", "Speed and memory, part by part.", examples=EXAMPLES)
    add, rare = parser.add_argument, parser.add_rare
    add_model_options(parser, default=None)
    add("--shape", choices=SHAPES, metavar="S",
        help="random weights, in bf16 by default: tiny (default), 11b, 90b, 11b-base, 90b-base")
    add("--layers", type=whole_number, metavar="N", help="a slice: N decoder layers, 2 vision layers a kind")
    parser.section("what is measured")
    add("--batch", type=numbers, metavar="N,...", help="questions about one image; default 1")
    add("--tiles", type=numbers, metavar="N,...", help="of the image; default 1,4")
    rare("--prompt-tokens", type=whole_number, default=128, metavar="N", help="default 128")
    rare("--new-tokens", type=whole_number, default=32, metavar="N",
         help="decode steps of an answer; default 32")
    rare("--repeat", type=whole_number, default=7, metavar="N", help="rounds, after warm-up; default 7")
    add("--against", choices=[PEER], help="on the same weights, in turns")
    add("--compile", action="store_true", help="also decode compiled")
    add("--prune", metavar="P,...", help="also with these methods, as of generate.py")
    add("--keep", metavar="R,...", help="keep ratios, of each method")
    rare("--set", action="append", default=[], metavar="K=V",
         help="an option of all methods that have it, or P.K=V of one")
    parser.section("other measurements")
    rare("--preset", choices=["table2"], help="the decoder alone, as in Table 2 of the paper")
    rare("--waterfall", action="store_true", help="only what each optimisation of decoding gains, in a row")
    rare("--methods", metavar="P,...", help="only what each of these (or 'all') costs and stores")
    rare("--whole", metavar="P,...",
         help="only what each of them costs and saves in the complete model, put together from a slice")
    parser.section("what is written")
    add("--json", type=Path, metavar="F", help="write all of it")
    rare("--plot", type=Path, metavar="F", help="draw it: .png, .svg or .pdf")
    rare("--report", action="store_true", help="only write the READMEs from benchmarks/results/*.json")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """The type of an argument: "1,4" is [1, 4]."""
    return [whole_number(part) for part in text.split(",")]


def command(args: argparse.Namespace):
    if args.report:
        return tables.write_pages(RESULTS, ROOT / "benchmarks" / "README.md", ROOT / "README.md")
    pruners = check(args)
    device = parse_device(args.device)
    subject, loading = make_subject(args, device)
    say_how(subject.model, args, find_adapters(args.adapter))
    with torch.inference_mode():
        made = measure(args, subject, loading, pruners)
    save(args, made)
    print(text(made, stdout_width()))
    if args.plot is not None:
        with writing("--plot", args.plot) as partial_file:
            plot(made, partial_file)


def save(args: argparse.Namespace, made: dict):
    """Write what has been measured so far: whoever stops a long measurement keeps that."""
    if args.json is not None:
        with writing("--json", args.json) as partial_file:
            partial_file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, subject: Subject, loading: Samples, pruners: list[Pruner]) -> dict:
    """What `--json` writes."""
    ways = [EAGER, STATIC] if args.compile else [EAGER]
    peers = {} if args.against is None else {how: Peer(subject.model, static=how == STATIC) for how in ways}
    bench = Bench(args, subject, peers, pruners, ceilings(subject.device))
    settings = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeat", "preset")}
    made = {"machine": machine(subject.device), "versions": versions(peers), "command": spoken(sys.argv[1:]),
            "settings": settings, "ceilings": bench.ceilings, "equal": [], "rows": [], "waterfall": [],
            "methods": [], "whole": [], "masks": [], "compiled": [], "quantized": [], "table2": [],
            "operations": []}
    one = args.batch[0], args.tiles[0], args.prompt_tokens, args.new_tokens, args.repeat
    if args.quantize is not None:
        made["about"] = bench.about(args.batch[0], args.tiles[0])
        measured = Quantized(subject, args.quantize.split(","), pruners, peers.get(EAGER), args.compile,
                             bench.ceilings["copy_bytes_per_s"], args.tiles[0])
        for batch in args.batch:
            made["quantized"] += measured.measure(batch, *one[2:])
            made["compiled"] += measured.compare(batch, *one[2:4])
            save(args, made)
    elif args.methods is not None:
        made["about"] = bench.about(args.batch[0], args.tiles[0])
        made["methods"] = methods(subject, pruners, *one, random=args.model is None)
    elif args.whole is not None:
        made["about"] = bench.about(1, args.tiles[0])
        made["whole"] = whole(subject, pruners, args.tiles, *one[2:], random=args.model is None)
        made["masks"] = masks(subject, args.tiles, args.prompt_tokens, args.repeat)
    elif args.waterfall:
        made["about"] = bench.about(args.batch[0], args.tiles[0])
        made["waterfall"] = waterfall(subject, peers.get(EAGER), pruners[-1], *one)
    elif args.preset and subject.config != subject.complete:
        made["about"] = bench.about(args.batch[0], args.tiles[0])
        put_together(subject, pruners, args.batch, args.tiles[0], args.prompt_tokens, args.repeat, made,
                     partial(save, args))
    else:
        made["rows"] = bench.rows("load", None, None, loading) if loading else []
        for tiles in args.tiles:
            if args.preset:
                made["operations"] += of_complete(subject, pruners, tiles, args.prompt_tokens)
            bench.run(tiles, made, partial(save, args))
    return made


def check(args: argparse.Namespace) -> list[Pruner]:
    """The methods to measure, the unpruned model first. Raises every ValueError that needs no model."""
    one = args.waterfall or args.methods is not None or args.quantize is not None
    preset = paper.SETTINGS if args.preset else {"batch": [1], "tiles": [1] if one else [1, 4]}
    args.batch = args.batch or preset["batch"]
    args.tiles = args.tiles or preset["tiles"]
    check_numbers(args)
    check_together(args)
    if args.prune is None and args.waterfall:
        args.prune = "trimmed_llama"
    if args.plot is not None:
        check_plot(args.plot)
    check_output("--json", args.json)
    if args.against is not None:
        import_transformers()
    several = args.whole if args.methods is None else args.methods
    if several is not None:
        keeps = "0.25" if args.keep is None else args.keep
        return [Pruner(), *parse_pruners(several, keeps.split(","), args.set)]
    kept = of_table2(args) if args.preset else chosen(args)
    return [Pruner(), *(pruner for pruner in kept if not pruner.keeps_all)]


def of_table2(args: argparse.Namespace) -> list[Pruner]:
    """The methods of the preset, the larger share first, and random at both of the paper's. A share is of the
    image tokens that are used, as in the paper: a method that may keep more gets it as its budget too."""
    methods = paper.METHODS if args.prune is None else args.prune
    shares = paper.SHARES if args.keep is None else args.keep
    pruners = [*parse_pruners("random", paper.SHARES.split(","), []),
               *parse_pruners(methods, shares.split(","), args.set)]
    pruners = [replace(pruner, budget=pruner.keep) if has_option(type(pruner), "budget")
               and "budget" not in pruner.options_set() else pruner for pruner in pruners]
    once = {str(pruner): pruner for pruner in pruners}
    return sorted(once.values(), key=lambda pruner: -(pruner.keep or 0))


def chosen(args: argparse.Namespace) -> list[Pruner]:
    """The methods of --prune: one at its own keep ratio, or several at each of those of --keep."""
    if args.prune is not None and args.keep is not None:
        return parse_pruners(args.prune, args.keep.split(","), args.set)
    if args.prune is not None and "," in args.prune:
        raise ValueError(f"--prune {quoted(args.prune)}: several methods need a --keep")
    own = parse_pruner(args.prune, args.keep, args.set)
    return [] if own is None else [own]


def check_numbers(args: argparse.Namespace):
    """Raise ValueError for numbers that are too small or too large."""
    for name in "layers", "batch", "tiles", "prompt_tokens", "new_tokens", "repeat":
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(1 <= number <= LARGEST for number in values):
            raise ValueError(f"--{name.replace('_', '-')} is {quoted(value)}, but must be at least 1 and at "
                             f"most {LARGEST}")


def check_together(args: argparse.Namespace):
    """Raise ValueError for options that exclude each other."""
    if args.model is not None and (args.shape or args.layers):
        raise ValueError("--model is a whole model with its own weights: leave out --shape and --layers")
    if args.model is None and args.adapter:
        raise ValueError("--adapter is merged into a model with weights: give --model")
    if args.preset and args.waterfall:
        raise ValueError("--preset and --waterfall are two measurements: give one of them")
    if args.preset and args.layers and (args.against or args.compile):
        raise ValueError("--preset of a slice is put together from its pieces: leave out --against and "
                         "--compile, or leave out --layers")
    if args.quantize is not None and (args.preset or args.waterfall or args.plot
                                      or args.methods is not None or args.whole is not None):
        raise ValueError("--quantize is a measurement of its own, and a table: leave out --preset, "
                         "--waterfall, --plot, --methods and --whole")
    others = args.preset or args.waterfall or args.prune or args.against or args.plot
    if args.methods is not None and (others or args.whole is not None):
        raise ValueError("--methods is a measurement of its own, and a table: leave out --preset, "
                         "--waterfall, --prune, --against, --plot and --whole")
    if args.whole is not None and (others or args.batch != [1]):
        raise ValueError("--whole is a measurement of its own, and a table, of one question: leave out "
                         "--preset, --waterfall, --prune, --against, --plot and --batch")


def make_subject(args: argparse.Namespace, device: torch.device) -> tuple[Subject, Samples]:
    """The model, and how long loading took if it is a real one."""
    dtype = parse_dtype(args.dtype)
    for way in [] if args.quantize is None else args.quantize.split(","):
        check_quantize(way, device, dtype)
    adapters = find_adapters(args.adapter)
    folder = None if args.model is None else find_base(args.model, args.revision, adapters)
    complete = SHAPES[args.shape or "tiny"]() if folder is None else read_config(folder)
    for tiles in args.tiles:
        grid_of(complete.vision, tiles)
    check_length(args.prompt_tokens, args.new_tokens + 1, complete.text.max_position_embeddings)
    if folder is not None:
        open_model = partial(load_model, folder, device, dtype, adapters=adapters)
        samples = times_in_turns({(FULL, EAGER): open_model}, args.repeat, device, f"loading {folder.name}")
        model = open_model().requires_grad_(False)
        return Subject(model, generate, folder.name, model.config), samples
    config = complete if args.layers is None else cut(complete, args.layers)
    with Progress(f"random weights of {args.shape or 'tiny'}", in_file=True):
        model = random_model(config, device, dtype or torch.bfloat16)
    return Subject(model, generate, args.shape or "tiny", complete), {}


def versions(peers: dict[str, Peer]) -> dict[str, str | None]:
    return {"torch": torch.__version__, "transformers": peers[EAGER].version if peers else None,
            "python": sys.version.split()[0]}


def spoken(argv: list[str]) -> str:
    """The command, with the names of files and not their places on this machine."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in argv)
    return shlex.join(["python", "benchmark.py", *words])


def main():
    program.run(command, arguments)


if __name__ == "__main__":
    main()
