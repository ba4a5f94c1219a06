"""How often a checkpoint is right about the built-in scenes, whole and pruned: `python evaluate.py`.

Held-out test scenes of all eight tile ratios in turn, the same questions every time, as many of each kind
as of any other. An answer counts when it equals the expected one to the letter. The gates of the
cross-attention layers are printed too, and `--skip-layer 0` closes one of them, to see what the model loses
without it. `--prune a,b --keep 0.5,0.1` asks everything again with every method at every keep ratio. Long
runs may be stopped: with `--json FILE` what is done stands in FILE.part, and the same command goes on there.
`results.py` makes figures of the answers, and puts error bands around them.
"""
import argparse
import math
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import program

program.begin(__name__)

import torch
from PIL import ImageFilter
from torch import Tensor
from torch.nn.functional import normalize

from cli import Parser, mean, parse_pruners
from evaluation.results import Papers, Score, Store, check_plot, denied, figures, full_score, plot, table
from generate import Assistant
from model.answer import EncodedImages
from model.decoder import CrossAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.llama_vision import LlamaVision
from program import say
from pruning import Pruner, attention_received, hooks, top_k_mask
from scenes.draw import RATIOS, Scene, draw, make_scene
from scenes.questions import KINDS, Question, ask
from weights import find_checkpoint
from weights.tokenizer import messages

PER_IMAGE = 3             # questions asked about one image
MAX_NEW_TOKENS = 64
KEEPS = "0.5,0.25,0.1,0.05,0.02"
SMALL = 100_000_000         # bytes of weights that are read to know them again


def exam(count: int, split: str = "test", kinds: Sequence[str] = tuple(KINDS)) -> Papers:
    """`count` questions about scenes of a split, every one of `kinds` about equally often: the first kinds of
    a scene are those asked least so far."""
    asked, papers, index = Counter(), [], 0
    while (left := count - asked.total()) > 0:
        scene = make_scene(split, index, RATIOS[index % len(RATIOS)])
        rng = random.Random(f"exam/{split}/{index}")
        wanted = sorted(kinds, key=lambda kind: asked[kind])
        possible = (question for kind in wanted if (question := ask(scene, rng, kind)) is not None)
        questions = [question for question, _ in zip(possible, range(min(PER_IMAGE, left)), strict=False)]
        asked.update(question.kind for question in questions)
        papers += [(scene, questions)] if questions else []
        index += 1
    return papers


def evaluate(assistant: Assistant, papers: Papers, pruners: Sequence[Pruner] = (Pruner(),),
             compare_layers: bool = False, done: Sequence[dict] = (), store: Store | None = None,
             blur: float = 0) -> list[dict]:
    """Ask everything with every pruner, greedily: the records of all images, as `examine` makes them.

    `done` are those of the first images, from an earlier run; each new one is added to `store`.
    """
    records, began = list(done), time.monotonic()
    for scene, questions in papers[len(done):]:
        records.append(examine(assistant, scene, questions, pruners, compare_layers, blur))
        if store:
            store.add(records[-1])
        if sys.stderr.isatty():
            each = (time.monotonic() - began) / (len(records) - len(done))
            show_progress(len(records), len(papers), each)
    return records


def examine(assistant: Assistant, scene: Scene, questions: list[Question], pruners: Sequence[Pruner],
            compare_layers: bool, blur: float = 0) -> dict:
    """A image's questions in one batch, with every pruner. Of each pruner: which answers are `right`, which
    say yes to what is not there (`wrong_yes`) and which a smaller model gave (`early`), the share `kept` of
    the image tokens for each question, and bytes, times and decode `steps` of the batch."""
    drawn = [draw(scene).filter(ImageFilter.GaussianBlur(blur)) if blur else draw(scene)]
    whole = assistant.encode_images(drawn, keep_states=any(pruner.keep_states for pruner in pruners))
    turns, rows = [messages(question.text, 1) for question in questions], []
    for pruner in pruners:
        if rows and pruner.keeps_all:                   # as the first one, which was asked already
            rows.append(rows[0])
            continue
        shrinks = "preprocess" in hooks(type(pruner)) and not pruner.keeps_all
        image = assistant.encode_images(drawn, pruner) if shrinks else whole
        answer = assistant.answer(turns, image, MAX_NEW_TOKENS, pruner=pruner)
        texts = [assistant.tokenizer.decode(tokens) for tokens in answer.tokens]
        # The first token comes from prefill; each further one, or the stop token, takes a step.
        steps = max(min(len(tokens), MAX_NEW_TOKENS - 1) for tokens in answer.tokens)
        rows.append({"right": [text == question.answer
                               for text, question in zip(texts, questions, strict=True)],
                     "wrong_yes": [denied(question) and text == "yes"
                                   for text, question in zip(texts, questions, strict=True)],
                     "early": [row in answer.early for row in range(len(questions))],
                     "kept": [mean(layers) / image.real for layers in answer.kept],
                     "image_kv_bytes": answer.image_kv_bytes, "image_kv_stored": answer.image_kv_stored,
                     "prefill_ms": answer.ms["prefill"], "decode_ms": answer.ms["decode"], "steps": steps})
    return {"rows": rows, "alike": layers_alike(assistant, turns, whole) if compare_layers else None}


def show_progress(done: int, total: int, seconds_each: float):
    minutes, seconds = divmod(round((total - done) * seconds_each), 60)
    left = f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{seconds:02}"
    bar = f"[{'=' * (30 * done // total):30}]"
    say(f"\r{bar} {done}/{total} images, {left} left      ", end="\n" if done == total else "")


# ----- what the cross-attention layers have in common


class Observer(Pruner):
    """Keeps everything, and notes how much attention of the prompt each image token gets in each layer."""
    keeps_all = False               # or no hook would be called

    def __post_init__(self):
        super().__post_init__()
        self.masses: list[Tensor] = []                                                      # C of [B, N]

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        self.masses.append(attention_received(queries, kv, per="layer"))
        return image, kv


def layers_alike(assistant: Assistant, turns: list[list[dict]], image: EncodedImages) -> dict:
    """How alike the attention maps of the layers are: sums over the questions, two matrices [C][C].

    `cosine` of two maps, and `top10_overlap`, the share of the 10 % of tokens that get most attention in one
    layer which are among those of the other. Maps that sum to 1 would give the same.
    """
    observer = Observer()
    assistant.answer(turns, image, 1, pruner=observer)                       # prefill is all that it takes
    maps = torch.stack(observer.masses, dim=1)                                              # [B, C, N]
    best, unit = top_k_mask(maps, 0.1, image.tokens).double(), normalize(maps.double(), dim=-1)
    overlap = best @ best.mT / best[0, 0].sum()
    return {"cosine": (unit @ unit.mT).sum(0).tolist(), "top10_overlap": overlap.sum(0).tolist()}


# ----- gates


def gates(model: LlamaVision) -> list[tuple[float, float]]:
    """tanh of the attention and the MLP gate of each cross-attention layer."""
    return [(layer.cross_attn_attn_gate.tanh().item(), layer.cross_attn_mlp_gate.tanh().item())
            for layer in cross_layers(model)]


def close(model: LlamaVision, ordinal: int):
    """Set the gates of a cross-attention layer to 0: what comes in goes out unchanged."""
    layers = cross_layers(model)
    if not 0 <= ordinal < len(layers):
        raise ValueError(f"--skip-layer {ordinal}: there are cross-attention layers 0 to {len(layers) - 1}")
    for gate in layers[ordinal].cross_attn_attn_gate, layers[ordinal].cross_attn_mlp_gate:
        gate.data = gate.new_zeros(1)


def cross_layers(model: LlamaVision) -> list[CrossAttentionLayer]:
    return model.language_model.cross_layers


# ----- the command line


def settings_of(args: argparse.Namespace, pruners: list[Pruner]) -> dict:
    """All that the answers depend on: partial or complete results of other settings are never used."""
    files = [name.rpartition(":")[0] for name in (args.prune or "").split(",") if ":" in name]
    return {"model": args.model, "weights": fingerprint(find_checkpoint(args.model)),
            "questions": args.questions, "kinds": args.kinds, "blur": args.blur,
            "skip_layer": args.skip_layer, "device": args.device,
            "dtype": args.dtype, "files": {name: zlib.crc32(Path(name).read_bytes()) for name in files},
            "rows": [[pruner.name, pruner.keep, pruner.options_set()] for pruner in pruners]}


def fingerprint(folder: Path) -> int:
    """A number that other weights hardly share, quickly: of the configuration and of the first file of
    weights, or of its size alone where it is large."""
    value = zlib.crc32((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        size = path.stat().st_size
        value = zlib.crc32(path.read_bytes() if size < SMALL else str(size).encode(), value)
    return value


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python evaluate.py", description="Accuracy on the built-in test scenes.")
    add = parser.add_argument
    add("--model", default="tiny", metavar="M", help="'tiny' (bundled, the default), a folder, or a hub id")
    add("--questions", type=int, default=2000, metavar="N", help="default 2000")
    add("--kinds", metavar="K,...", help=f"of question; default {','.join(KINDS)}")
    add("--blur", type=float, default=0, metavar="R", help="blur the images: a Gaussian of R pixels")
    add("--skip-layer", type=int, metavar="I", help="close cross-attention layer I")
    add("--prune", metavar="P,...", help="also with these methods, or 'all'; your own: FILE.py:CLASS")
    add("--keep", metavar="R,...", help=f"each at these fractions, or numbers of tokens; default {KEEPS}")
    add("--set", action="append", default=[], metavar="P.K=V", help="another option of a method")
    add("--device", metavar="D", help="cpu, cuda, ...; default: cuda where there is one")
    add("--dtype", metavar="T", help="bf16, fp16, fp32; default: the checkpoint's")
    add("--json", type=Path, metavar="FILE", help="also write the figures to FILE; FILE.part while it runs")
    add("--plot", type=Path, metavar="FILE", help="also draw accuracy against tokens kept: .png, .svg, .pdf")
    return parser.parse_args()


def plan(prune: str | None, keep: str | None, settings: list[str]) -> list[Pruner]:
    """The full model, then every method at every keep ratio; ValueError with one line for bad input."""
    if prune is None:
        if keep is not None or settings:
            raise ValueError("--keep and --set are options of methods: name these with --prune")
        return [Pruner()]
    pruners = parse_pruners(prune, (KEEPS if keep is None else keep).split(","), settings)
    return [Pruner(), *(pruner for pruner in pruners if type(pruner) is not Pruner)]


def check(args: argparse.Namespace, pruners: list[Pruner]):
    """ValueError with one line for what would fail only after the last question."""
    if args.questions < 1:
        raise ValueError(f"--questions is {args.questions}, but must be at least 1")
    if not 0 <= args.blur < math.inf:
        raise ValueError(f"--blur is {args.blur}, but must be 0 or more pixels")
    for kind in kinds_of(args):
        if kind not in KINDS:
            raise ValueError(f"--kinds: no question is of kind {kind!r}; choose of {', '.join(KINDS)}")
    if args.prune is not None and args.skip_layer is not None:
        raise ValueError("--skip-layer is of the full model: it does not go with --prune")
    if args.plot is not None:
        check_plot(args.plot)
        if len(pruners) == 1:
            raise ValueError("--plot draws methods: name at least one with --prune")
    for option, path in ("--json", args.json), ("--plot", args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}; create it first")
        if path is not None and path.exists() and not path.is_file():
            raise ValueError(f"{option} {path}: this is not a file; choose another name")


def kinds_of(args: argparse.Namespace) -> list[str]:
    return list(KINDS) if args.kinds is None else list(dict.fromkeys(args.kinds.split(",")))


def command(args: argparse.Namespace):
    pruners = plan(args.prune, args.keep, args.set)
    check(args, pruners)
    settings = settings_of(args, pruners)
    store = args.json and Store(args.json.resolve(), settings)
    made = store.finished() if store and args.plot else None
    if made is None:
        made = measure(args, settings, pruners, store)
    else:
        say(f"{args.json} holds the answers of this command already; delete it to ask again")
    if args.prune is not None:
        print(table(made))
    if args.plot:
        plot(made, args.plot)


def measure(args: argparse.Namespace, settings: dict, pruners: list[Pruner], store: Store | None) -> dict:
    """Ask, or go on asking, and store the figures; those of the full model alone are printed at once."""
    done = store.records() if store else []
    assistant = Assistant(args.model, args.device, args.dtype)
    opened = gates(assistant.model)
    if args.skip_layer is not None:
        close(assistant.model, args.skip_layer)
    papers = exam(args.questions, kinds=kinds_of(args))
    records = evaluate(assistant, papers, pruners, args.prune is not None, done, store, args.blur)
    made = figures(settings, papers, records, opened)
    if args.prune is None:
        print_full(full_score(papers, records), opened)
        if (share := made["rows"][0]["wrong_yes"]) is not None:
            print(f"wrong yes  {share:6.1%} of questions whether something is there that is not")
    if store:
        store.finish(made)
    return made


def print_full(score: Score, opened: list[tuple[float, float]]):
    for kind in KINDS:
        if score.asked[kind]:
            print(f"{kind:10} {score.share(kind):6.1%} of {score.asked[kind]}")
    print(f"{'mean':10} {score.mean():6.1%} over kinds, {score.share('all'):.1%} of all {score.asked['all']}")
    print("tiles     ", ", ".join(f"{r}x{c} {score.share((r, c)):.1%}" for r, c in RATIOS))
    print("gates     ", ", ".join(f"{attention:.2f}/{mlp:.2f}" for attention, mlp in opened))


def main():
    program.run(command, arguments)


if __name__ == "__main__":
    main()
