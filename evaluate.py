"""How often a checkpoint is right about the built-in scenes, pruned or not: `python evaluate.py`.

    evaluation/exam.py ── questions ─► examine, with every pruner ── records ─► evaluation/scoring.py
            ─► figures ─► --json, and evaluation/plot.py ─► a table and a curve

The questions are the same every time, as many of each kind as of any other, about held-out scenes of all
eight tile ratios. An answer counts when it equals the expected one to the letter. With `--prune a,b --keep
0.5,0.1` every method answers everything at every keep ratio; `a,a:option=value` has a method twice. `--split
val` asks about validation scenes, so that test scenes do not decide what is chosen. `--skip-layer 0` closes
the gates of a cross-attention layer, which shows what the model loses without it. A long run may be stopped:
with `--json FILE` the answers so far are in FILE.part, and the same command goes on from there. `--jobs 2`
asks in two processes, each in one thread.
"""
from cli import program

program.begin(__name__)

import argparse
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from itertools import repeat
from pathlib import Path

from PIL import ImageFilter

from cli.answers import mean
from cli.options import (
    Parser,
    add_model_options,
    check_output,
    model_options,
    parse_pruners,
    parse_variants,
    real_number,
    say_how,
    whole_number,
    writing,
)
from cli.terminal import Progress, say_wrapped, stdout_width
from evaluation.exam import Exam, is_about_the_absent, make_exam
from evaluation.jobs import ahead
from evaluation.layers import Observer, close_gates, gates, layer_similarity
from evaluation.plot import check_plot, plot, summary, table
from evaluation.scoring import figures, full_score
from evaluation.store import Store
from generate import Assistant
from model.answer import Answer, EncodedImages
from pruning import Pruner, hooks
from scenes.draw import Scene, draw
from scenes.questions import KINDS, Question
from weights.adapter_file import ADAPTER, NONE, find_adapters
from weights.adapters import find_base
from weights.files import read_bytes
from weights.fingerprint import fingerprint
from weights.messages import quoted
from weights.ranks import Ranks, join
from weights.tokenizer import messages

MAX_NEW_TOKENS = 64
SPLITS = {"val": "validation", "test": "test"}
KEEPS = "0.5,0.25,0.1,0.05,0.02"
MOST_QUESTIONS = 1_000_000
MOST_BLUR = 1000            # pixels
MOST_JOBS = 256


def evaluate(assistant: Assistant, exam: Exam, pruners: Sequence[Pruner] = (Pruner(),),
             compare_layers: bool = False, store: Store | None = None, blur: float = 0,
             elsewhere: Iterable[dict | None] | None = None) -> list[dict]:
    """Ask everything with every pruner, greedily. Returns the records of all images, as `examine` makes them.

    Those that `store` has already are not asked again, and each new one is added to it. `elsewhere`
    has the new ones if other processes make them, None for one that is to be made here.
    """
    records = assistant.ranks.first(lambda: list(store.records) if store else [])
    known = len(records)
    with Progress("images") as report:
        report(known, len(exam))
        for (scene, questions), record in zip(exam[known:], elsewhere or repeat(None), strict=False):
            records.append(record or examine(assistant, scene, questions, pruners, compare_layers, blur))
            if store:
                store.add(records[-1])
            report(len(records), len(exam))
    return records


def examine(assistant: Assistant, scene: Scene, questions: list[Question], pruners: Sequence[Pruner],
            compare_layers: bool, blur: float = 0) -> dict:
    """The record of one image: `rows` has what its questions, in one batch, gave with each pruner."""
    images = [draw(scene)]
    if blur:
        images = [image.filter(ImageFilter.GaussianBlur(blur)) for image in images]
    conversations = [messages(question.text, 1) for question in questions]
    unpruned = assistant.encode_images(images, keep_states=any(pruner.keep_states for pruner in pruners))
    rows = []
    for pruner in pruners:
        if rows and pruner.keeps_all:                   # the same as the first one, which was asked already
            rows.append(rows[0])
            continue
        encoded = unpruned
        if "preprocess" in hooks(type(pruner)) and not pruner.keeps_all:
            encoded = assistant.encode_images(images, pruner)
        answer = assistant.answer(conversations, encoded, MAX_NEW_TOKENS, pruner=pruner)
        texts = [assistant.tokenizer.decode(tokens) for tokens in answer.tokens]
        rows.append(row_of(answer, encoded, texts, questions))
    similarity = None
    if compare_layers:
        observer = Observer()
        assistant.answer(conversations, unpruned, 1, pruner=observer)       # only prefill is needed
        similarity = layer_similarity(observer.received, unpruned.tokens)
    return {"rows": rows, "layer_similarity": similarity}


def row_of(answer: Answer, encoded: EncodedImages, texts: list[str], questions: list[Question]) -> dict:
    """What one pruner gave: lists with an entry for each question, and bytes and times of the batch."""
    pairs = list(zip(texts, questions, strict=True))
    # The first token comes from prefill. Every other one, and the stop token, takes a step of decoding.
    steps = max(min(len(tokens), MAX_NEW_TOKENS - 1) for tokens in answer.tokens)
    return {"right": [text == question.answer for text, question in pairs],
            "wrong_yes": [is_about_the_absent(question) and text == "yes" for text, question in pairs],
            "early": [i in answer.early for i in range(len(questions))],    # answered by a smaller model
            "kept": [mean(layers) / encoded.real for layers in answer.kept],
            "image_kv_bytes": answer.image_kv_bytes, "image_kv_stored": answer.image_kv_stored,
            "prefill_ms": answer.ms["prefill"], "decode_ms": answer.ms["decode"], "steps": steps}


# ----- the command line


EXAMPLES = ("python evaluate.py --questions 200",
            "python evaluate.py --prune trimmed_llama,fastv --keep 0.5,0.1")


def arguments() -> argparse.Namespace:
    parser = Parser("python evaluate.py", "Accuracy on the built-in scenes.", examples=EXAMPLES)
    add, rare = parser.add_argument, parser.add_rare
    add_model_options(parser)
    parser.section("what is asked")
    add("--questions", type=whole_number, default=2000, metavar="N", help="how many; default 2000")
    add("--split", choices=SPLITS, default="test", help="the scenes asked about; default test")
    rare("--kinds", metavar="K,...", help=f"of question; default all: {', '.join(KINDS)}")
    rare("--blur", type=real_number, default=0, metavar="R", help="blur the images: a Gaussian of R pixels")
    rare("--skip-layer", type=whole_number, metavar="I", help="close cross-attention layer I")
    parser.section("methods")
    add("--prune", metavar="P,...", help="also with these methods, 'all', or FILE.py:CLASS")
    add("--keep", metavar="R,...", help=f"each at these keep ratios; default {KEEPS}")
    rare("--set", action="append", default=[], metavar="P.K=V",
         help="another option of a method; K=V for all methods that have it; --prune P,P:K=V has P twice, "
         "with and without an option of its own")
    parser.section("how, and where to")
    add("--jobs", type=whole_number, metavar="N",
        help="processes, each in one thread; default: one for all cores")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE; FILE.part while it runs")
    add("--plot", type=Path, metavar="FILE", help="draw accuracy against tokens: .png, .svg, .pdf")
    return parser.parse_args()


def command(args: argparse.Namespace):
    pruners = plan(args.prune, args.keep, args.set)
    check(args, pruners)
    settings = settings_of(args, pruners)
    ranks = join(args.device)
    writes = ranks.rank == 0
    store = Store(args.json.resolve(), settings) if args.json is not None and writes else None
    made = ranks.first(lambda: store.finished() if store and args.plot else None)
    if made is None:
        made = measure(args, settings, pruners, store, ranks)
    else:
        say_wrapped(f"{args.json} holds the answers of this command already; delete it to ask again")
    if args.prune is not None:
        print(table(made, stdout_width()))
    if args.plot is not None and writes:
        with writing("--plot", args.plot) as file:
            plot(made, file)


def plan(prune: str | None, keep: str | None, settings: list[str]) -> list[Pruner]:
    """The full model, then every method at every keep ratio. ValueError with one line for bad input."""
    if prune is None:
        if keep is not None or settings:
            raise ValueError("--keep and --set are options of methods: name these with --prune")
        return [Pruner()]
    pruners = parse_pruners(prune, (KEEPS if keep is None else keep).split(","), settings)
    return [Pruner(), *(pruner for pruner in pruners if type(pruner) is not Pruner)]


def check(args: argparse.Namespace, pruners: list[Pruner]):
    """ValueError with one line for what would otherwise fail only after the last question."""
    if not 1 <= args.questions <= MOST_QUESTIONS:
        raise ValueError(f"--questions is {args.questions}, but must be at least 1, at most "
                         f"{MOST_QUESTIONS}")
    if not 0 <= args.blur <= MOST_BLUR:
        raise ValueError(f"--blur is {args.blur}, but must be 0 or more pixels, at most {MOST_BLUR}")
    if args.jobs is not None and not 1 <= args.jobs <= MOST_JOBS:
        raise ValueError(f"--jobs is {args.jobs}, but must be at least 1, at most {MOST_JOBS}")
    for kind in kinds_of(args):
        if kind not in KINDS:
            raise ValueError(f"--kinds: no question is of kind {quoted(kind)}; choose of {', '.join(KINDS)}")
    if args.jobs is not None and program.processes() > 1:
        raise ValueError("--jobs is for models that one process holds: leave it out under torchrun")
    if args.prune is not None and args.skip_layer is not None:
        raise ValueError("--skip-layer is of the full model: it does not go with --prune")
    check_output("--json", args.json)
    if args.plot is not None:
        check_plot(args.plot)
        if len(pruners) == 1:
            raise ValueError("--plot draws methods: name at least one with --prune")
        if args.json is not None and args.json.resolve() == args.plot.resolve():
            raise ValueError("--json and --plot name the same file: give them two names")


def kinds_of(args: argparse.Namespace) -> list[str]:
    return list(KINDS) if args.kinds is None else list(dict.fromkeys(args.kinds.split(",")))


def settings_of(args: argparse.Namespace, pruners: list[Pruner]) -> dict:
    """Everything that the answers depend on: results of other settings are never taken for these."""
    names = [] if args.prune is None else [name for name, _ in parse_variants(args.prune)]
    files = [name.rpartition(":")[0] for name in names if ":" in name]
    given = {name: value for name, value in (("revision", args.revision), ("quantize", args.quantize))
             if value is not None}
    folders = find_adapters(args.adapter)
    merged = [[adapter, fingerprint(folder, ADAPTER)]
              for adapter, folder in zip(args.adapter, folders, strict=True) if folder != NONE]
    adapters = {"adapters": merged} if merged else {}
    return {"split": SPLITS[args.split], **given,
            "model": args.model, **adapters,
            "weights": fingerprint(find_base(args.model, args.revision, folders)),
            "questions": args.questions, "kinds": args.kinds, "blur": args.blur,
            "skip_layer": args.skip_layer, "device": args.device, "dtype": args.dtype,
            "files": {name: zlib.crc32(read_bytes(name)) for name in files},
            "rows": [[pruner.name, pruner.keep, pruner.options_set()] for pruner in pruners]}


def measure(args: argparse.Namespace, settings: dict, pruners: list[Pruner], store: Store | None,
            ranks: Ranks) -> dict:
    """Ask, or go on asking, and store the figures; those of the full model alone are printed at once."""
    with store or nullcontext():
        exam, assistant, opened = prepare(args, ranks)
        if store:
            store.check(exam, len(pruners), None if args.prune is None else len(opened))
        left = range(len(store.records) if store else 0, len(exam))
        jobs = nullcontext() if args.jobs is None else closing(ahead(args.jobs, examiner, (args,), left))
        with jobs as elsewhere:
            records = evaluate(assistant, exam, pruners, args.prune is not None, store, args.blur, elsewhere)
        made = figures(settings, exam, records, opened)
        if store:
            store.finish(made)
    if args.prune is None:
        print(summary(full_score(exam, records), opened, settings["split"], stdout_width()))
        wrong_yes = made["rows"][0]["wrong_yes"]
        if wrong_yes is not None:
            print(f"wrong yes  {wrong_yes:6.1%} of questions whether something is there that is not")
    return made


def prepare(args: argparse.Namespace,
            ranks: Ranks | None = None) -> tuple[Exam, Assistant, list[tuple[float, float]]]:
    """What is asked, who answers, and the gates before any of them was closed."""
    exam = make_exam(args.questions, SPLITS[args.split], kinds_of(args))
    assistant = Assistant(args.model, ranks=ranks, **model_options(args))
    say_how(assistant.model, args, assistant.adapters)
    opened = gates(assistant.model)
    if args.skip_layer is not None:
        close_gates(assistant.model, args.skip_layer)
    return exam, assistant, opened


def examiner(args: argparse.Namespace) -> Callable[[int], dict]:
    """For a process of --jobs: what makes the record of an image by its number."""
    pruners = plan(args.prune, args.keep, args.set)
    exam, assistant, _ = prepare(args)
    return lambda number: examine(assistant, *exam[number], pruners, args.prune is not None, args.blur)


def main():
    program.run(command, arguments, together=True)


if __name__ == "__main__":
    main()
