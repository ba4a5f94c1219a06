"""How often a checkpoint is right about the built-in scenes: `python evaluate.py`.

Held-out test scenes of all eight tile ratios in turn, the same questions every time, as many of each kind
as of any other. An answer counts when it equals the expected one to the letter. The gates of the
cross-attention layers are printed too, and `--skip-layer 0` closes one of them, to see what the model loses
without it.
"""
import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from generate import Assistant, Parser, fail, say
from model.decoder import CrossAttentionLayer
from model.llama_vision import LlamaVision
from model.prompt import messages
from scenes.draw import RATIOS, Scene, draw, make_scene
from scenes.questions import KINDS, Question, ask

PER_PICTURE = 3             # questions asked about one picture


def exam(count: int, split: str = "test") -> list[tuple[Scene, list[Question]]]:
    """`count` questions about scenes of a split, every kind about equally often: the first kinds of a scene
    are those asked least so far."""
    asked, papers, index = Counter(), [], 0
    while (left := count - asked.total()) > 0:
        scene = make_scene(split, index, RATIOS[index % len(RATIOS)])
        rng = random.Random(f"exam/{split}/{index}")
        kinds = sorted(KINDS, key=lambda kind: asked[kind])
        possible = (question for kind in kinds if (question := ask(scene, rng, kind)) is not None)
        questions = [question for question, _ in zip(possible, range(min(PER_PICTURE, left)), strict=False)]
        asked.update(question.kind for question in questions)
        papers.append((scene, questions))
        index += 1
    return papers


@dataclass
class Score:
    """Right answers and questions, by kind and by ratio of tiles."""
    right: Counter
    asked: Counter

    def share(self, part) -> float:
        return self.right[part] / self.asked[part] if self.asked[part] else float("nan")

    def mean(self) -> float:
        """Over the kinds, each counted alike."""
        kinds = [kind for kind in KINDS if self.asked[kind]]
        return sum(map(self.share, kinds)) / len(kinds)


def evaluate(assistant: Assistant, papers: list[tuple[Scene, list[Question]]]) -> Score:
    """Ask everything, greedily; progress on stderr."""
    right, asked = Counter(), Counter()
    for done, (scene, questions) in enumerate(papers, start=1):
        picture = assistant.look([draw(scene)])
        turns = [messages(question.text, 1) for question in questions]
        answer = assistant.ask(turns, picture, max_new_tokens=64)
        for question, tokens in zip(questions, answer.tokens, strict=True):
            correct = assistant.prompter.decode(tokens) == question.answer
            for part in question.kind, (scene.rows, scene.columns), "all":
                asked[part] += 1
                right[part] += correct
        if sys.stderr.isatty():
            end = "\n" if done == len(papers) else ""
            say(f"\r{done}/{len(papers)} pictures, {right['all']}/{asked['all']} right", end)
    return Score(right, asked)


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


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python evaluate.py", description="Accuracy on the built-in test scenes.")
    add = parser.add_argument
    add("--model", default="tiny", metavar="M", help="'tiny' (bundled, the default), a folder, or a hub id")
    add("--questions", type=int, default=2000, metavar="N", help="default 2000")
    add("--skip-layer", type=int, metavar="I", help="close cross-attention layer I")
    add("--device", metavar="D", help="cpu, cuda, ...; default: cuda where there is one")
    add("--dtype", metavar="T", help="bf16, fp16, fp32; default: the checkpoint's")
    add("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return parser.parse_args()


def command(args: argparse.Namespace):
    if args.questions < 1:
        raise ValueError(f"--questions is {args.questions}, but must be at least 1")
    assistant = Assistant(args.model, args.device, args.dtype)
    opened = gates(assistant.model)
    if args.skip_layer is not None:
        close(assistant.model, args.skip_layer)
    score = evaluate(assistant, exam(args.questions))
    for kind in KINDS:
        print(f"{kind:10} {score.share(kind):6.1%} of {score.asked[kind]}")
    by_ratio = {f"{ratio[0]}x{ratio[1]}": score.share(ratio) for ratio in RATIOS}
    print(f"{'mean':10} {score.mean():6.1%} over kinds, {score.share('all'):.1%} of all {score.asked['all']}")
    print("tiles     ", ", ".join(f"{ratio} {share:.1%}" for ratio, share in by_ratio.items()))
    print("gates     ", ", ".join(f"{attention:.2f}/{mlp:.2f}" for attention, mlp in opened))
    if args.json:
        figures = {"model": args.model, "questions": args.questions, "skipped_layer": args.skip_layer,
                   "accuracy_by_kind": {kind: score.share(kind) for kind in KINDS},
                   "accuracy_by_ratio": by_ratio, "mean_over_kinds": score.mean(),
                   "accuracy": score.share("all"), "gates": opened}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main():
    try:
        command(arguments())
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
