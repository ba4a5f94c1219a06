"""How fast this is, part by part, beside transformers in the same process: `python benchmark.py`.

    for every number of tiles:      encode, project (projector and K/V of all cross-attention layers)
        for every batch:            prefill, prune (the method's own hooks), first_token (encode + prefill),
                                    decode (of a token, sampled greedily), peak_memory, image_kv

What is compared runs in turns (ours, theirs, ours, theirs, ...) on the same weights and inputs, and counts
with its median; ratio is theirs / ours: above 1 ours is better. Their outputs are compared too, transformers'
two deviations corrected for that alone. `--shape` makes random weights, `--layers` a slice. How each part is
measured: benchmarks/parts.py. The JSON holds all of it; `--report` makes the pages of such files.
"""
import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import program

program.begin(__name__)

import torch

from benchmarks import tables
from benchmarks.measure import ceilings, in_turns, machine
from benchmarks.methods import methods
from benchmarks.parts import EAGER, PEER, WHOLE, Bench, Samples
from benchmarks.peer import Peer, import_transformers
from benchmarks.subject import SHAPES, Subject, cut, grid_of, random_model
from benchmarks.waterfall import pace, waterfall
from cli import Parser, check_output, parse_pruner, parse_pruners, whole_number
from evaluation.plot import check_plot
from model.llama_vision import check_length
from program import say
from pruning import Pruner, load
from weights import find_checkpoint, load_model, parse_device, parse_dtype, read_config

ROOT = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE2 = {"batch": [1, 4, 8, 16, 32], "tiles": [4], "keep": [0.509, 0.396]}     # of arXiv 2504.00557


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python benchmark.py", description="Speed and memory, part by part.")
    add = parser.add_argument
    add("--model", metavar="M", help="real weights: 'tiny' (bundled), a folder, or a hub id")
    add("--shape", choices=SHAPES, help="random weights of this shape; default tiny")
    add("--layers", type=whole_number, metavar="N",
        help="a slice: N decoder layers, 2 vision layers of each kind")
    add("--batch", type=numbers, metavar="N,...", help="questions about the image; default 1")
    add("--tiles", type=numbers, metavar="N,...", help="of the image; default 1,4")
    add("--prompt-tokens", type=whole_number, default=128, metavar="N", help="default 128")
    add("--new-tokens", type=whole_number, default=32, metavar="N",
        help="that are timed in decode; default 32")
    add("--prune", metavar="P", help="also with this method ('list' of generate.py shows all)")
    add("--keep", metavar="R", help="its keep ratio")
    add("--set", action="append", default=[], metavar="K=V", help="one of its options; P.K=V with --methods")
    add("--against", choices=[PEER], help="on the same weights, in turns")
    add("--compile", action="store_true", help="also decode compiled; transformers with its static cache")
    add("--preset", choices=["table2"], help="the decoder alone, as in Table 2 of the paper")
    add("--waterfall", action="store_true", help="only what each lever of decoding gains, one after another")
    add("--methods", metavar="P,...", help="only what each method adds and holds, of these or 'all'")
    add("--json", type=Path, metavar="F", help="write all of it")
    add("--plot", type=Path, metavar="F", help="draw it: .png, .svg or .pdf")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D")
    add("--dtype", metavar="T", help="default bf16, or the checkpoint's own")
    add("--repeat", type=whole_number, default=7, metavar="N", help="rounds, after warm-up; default 7")
    add("--report", action="store_true", help="only write the READMEs from benchmarks/results/*.json")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [whole_number(part) for part in text.split(",")]


def command(args: argparse.Namespace):
    if args.report:
        return tables.write_pages(RESULTS, ROOT / "benchmarks" / "README.md", ROOT / "README.md")
    pruners = check(args)
    device = parse_device(args.device)
    subject, loading = make_subject(args, device)
    with torch.inference_mode():
        peer = None if args.against is None else Peer(subject.model)
        say("ceilings of this machine")
        bench = Bench(args, subject, peer, pruners, ceilings(device))
        settings = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeat", "preset")}
        made = {"machine": machine(device), "versions": versions(peer), "command": spoken(sys.argv[1:]),
                "settings": settings, "ceilings": bench.ceilings, "equal": [], "rows": [], "waterfall": [],
                "methods": []}
        if args.methods is not None:
            say("methods")
            made |= {"about": bench.about(args.batch[0], args.tiles[0]),
                     "methods": methods(subject, pruners, args.batch[0], args.tiles[0], args.prompt_tokens,
                                        args.new_tokens, args.repeat, args.model is None)}
        elif args.waterfall:
            say("waterfall")
            made |= {"about": bench.about(args.batch[0], args.tiles[0]),
                     "waterfall": waterfall(subject, peer, pruners[-1], args.batch[0], args.tiles[0],
                                            args.prompt_tokens, args.new_tokens, args.repeat)}
        else:
            made["rows"] = bench.rows("load", None, None, loading) if loading else []
            for tiles in args.tiles:
                bench.run(tiles, made)
    if args.json is not None:
        tables.write_text(args.json, json.dumps(made, indent=1) + "\n")
    print(tables.text(made))
    if args.plot is not None:
        tables.plot(made, args.plot)


def check(args: argparse.Namespace) -> list[Pruner]:
    """The methods to measure, the whole image first; every ValueError that needs no model is raised here."""
    one = args.waterfall or args.methods
    preset = TABLE2 if args.preset else {"batch": [1], "tiles": [1] if one else [1, 4]}
    args.batch, args.tiles = args.batch or preset["batch"], args.tiles or preset["tiles"]
    for name in "layers", "batch", "tiles", "prompt_tokens", "new_tokens", "repeat":
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if args.model is not None and (args.shape or args.layers):
        raise ValueError("--model is a whole model with its own weights: leave out --shape and --layers")
    if args.preset and args.waterfall:
        raise ValueError("--preset and --waterfall are two measurements: give one of them")
    if args.methods and (args.preset or args.waterfall or args.prune or args.against or args.plot):
        raise ValueError("--methods is a measurement of its own, and a table: leave out --preset, "
                         "--waterfall, --prune, --against and --plot")
    if args.prune is None and (args.waterfall or args.preset and args.keep is not None):
        args.prune = "trimmed_llama"
    if args.plot is not None:
        check_plot(args.plot)
    check_output("--json", args.json)
    if args.against is not None:
        import_transformers()
    if args.methods is not None:
        keep = "0.25" if args.keep is None else args.keep
        return [Pruner(), *parse_pruners(args.methods, [keep], args.set)]
    own = parse_pruner(args.prune, args.keep, args.set)
    kept = [load("random", keep=keep) for keep in preset.get("keep", [])]
    return [Pruner(), *kept, *([] if own is None or own.keeps_all else [own])]


def make_subject(args: argparse.Namespace, device: torch.device) -> tuple[Subject, Samples]:
    """The model, and how long loading took where it is a real one."""
    dtype = parse_dtype(args.dtype)
    if args.model is not None:
        folder = find_checkpoint(args.model)
        config = read_config(folder)
    else:
        config = SHAPES[args.shape or "tiny"]()
    for tiles in args.tiles:
        grid_of(config.vision, tiles)
    room = pace(args.new_tokens, args.repeat)[3]
    check_length(args.prompt_tokens, room, config.text.max_position_embeddings)
    if args.model is not None:
        say(f"loading {folder.name}")
        open_model = partial(load_model, folder, device, dtype)
        samples = in_turns({(WHOLE, EAGER): open_model}, args.repeat, device)      # one model at a time
        return Subject(open_model().requires_grad_(False), folder.name, config), samples
    whole, config = config, config if args.layers is None else cut(config, args.layers)
    say(f"random weights of {args.shape or 'tiny'}")
    return Subject(random_model(config, device, dtype or torch.bfloat16), args.shape or "tiny", whole), {}


def versions(peer: Peer | None) -> dict[str, str | None]:
    return {"torch": torch.__version__, "transformers": None if peer is None else peer.version,
            "python": sys.version.split()[0]}


def spoken(argv: list[str]) -> str:
    """The command, without where things lie on this machine."""
    words = (Path(word).name if Path(word).is_absolute() else word for word in argv)
    return shlex.join(["python", "benchmark.py", *words])


def main():
    program.run(command, arguments)


if __name__ == "__main__":
    main()
