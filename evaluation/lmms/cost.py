"""GPU hours of the paper's rows, computed from FLOPs and bytes: `python -m evaluation.lmms.cost --table 1`.

    seconds of a question = (FLOPs to encode the image and read the prompt) / (peak x share reached)
                          + decode steps x (bytes of weights and caches) / (bandwidth x share reached)

Nothing is measured here. FLOPs and bytes come from the shapes of the official models (`LlamaVision.flops`,
`kv_bytes`); what the tasks ask is assumed below; peaks are those of a data sheet, and the shares reached are
guesses that you may replace by what `benchmark.py` finds. Weights have 2 bytes, questions come one at a time,
and loading, cutting images and the judge cost nothing. Pruning is counted as saving nothing.
"""
import argparse
from dataclasses import dataclass

from cli.options import Parser, real_number
from cli.program import run, write
from cli.terminal import stdout_width
from evaluation.plot import blocks, in_columns
from model.llama_vision import LlamaVision
from pruning import METHODS
from weights.shapes import OFFICIAL
from weights.skeleton import without_weights


@dataclass(frozen=True)
class Task:
    """What a benchmark asks: questions, and of each the tiles of its image, tokens of prompt and answer."""
    name: str
    questions: int
    grid: tuple[int, int]
    prompt_tokens: int
    new_tokens: int


# Questions are those of the data sets. Tiles and tokens are assumed: four tiles, the most, where images are
# larger than a tile; answers are a letter or a word and the stop token, but for LLaVA-Bench.
TASKS = (Task("SEED-img", 14_233, (2, 2), 100, 3), Task("MME", 2_374, (2, 2), 50, 3),
         Task("MMVP", 300, (1, 1), 60, 3), Task("LLaVA-Bench", 60, (2, 2), 60, 400))
LEARNED = "quecc", "attention_predictor", "sgl"             # learned for one model: not in methods.sh
METHOD_ROWS = 1 + 4 * (len(METHODS) - 1 - len(LEARNED))     # the full model, and four keep ratios
ROWS = {"1": {"11b": 6, "90b": 3}, "3": {"11b": 3}, "methods": {"11b": METHOD_ROWS}}
BYTES = 2                                                   # of a weight, in bf16
CARD = 80e9                                                 # bytes of one card
COMPUTED = ("GPU hours, computed from FLOPs and bytes, not measured; where one card does not hold the "
            "weights, several wait for each other")


def arguments() -> argparse.Namespace:
    parser = Parser("python -m evaluation.lmms.cost", "GPU hours of a table, computed, not measured.")
    add = parser.add_argument
    add("--table", choices=ROWS, default="1", help="which script: table1, table3 or methods; default 1")
    add("--tflops", type=real_number, default=312, metavar="X", help="peak in bf16; default 312, of an A100")
    add("--bandwidth", type=real_number, default=2039, metavar="X",
        help="peak in GB/s; default 2039, of an A100")
    add("--compute-share", type=real_number, default=0.4, metavar="X",
        help="of the peak reached; default 0.4")
    add("--memory-share", type=real_number, default=0.6, metavar="X", help="of the bandwidth; default 0.6")
    return parser.parse_args()


def command(args: argparse.Namespace):
    for name in "tflops", "bandwidth", "compute_share", "memory_share":
        if not 0 < getattr(args, name) < 1e9:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and finite")
    speed = 1e12 * args.tflops * args.compute_share
    bandwidth = 1e9 * args.bandwidth * args.memory_share
    lines = [["", "rows", *(task.name for task in TASKS), "a row", "all rows", "cards"]]
    for size, rows in ROWS[args.table].items():
        model = without_weights(OFFICIAL[size])
        cards = -(-BYTES * sum(model.parameter_counts().values()) // CARD)
        hours = [cards * task.questions * seconds(model, task, speed, bandwidth) / 3600 for task in TASKS]
        lines.append([size, str(rows), *(f"{each:.2f}" for each in [*hours, sum(hours), rows * sum(hours)]),
                      f"{cards:.0f}"])
    columns = stdout_width()
    write("\n".join([*blocks(lines, columns, repeated=1), in_columns([COMPUTED], columns)]) + "\n")


def seconds(model: LlamaVision, task: Task, speed: float, bandwidth: float) -> float:
    """Of one question, with FLOPs and bytes a second."""
    flops = model.flops(task.prompt_tokens, [task.grid])
    weights = BYTES * sum(model.parameter_counts().values())
    read = weights - BYTES * model.parameter_counts()["vision"]
    cache = sum(BYTES * count // model.dtype.itemsize
                for count in model.kv_bytes(task.prompt_tokens + task.new_tokens, [task.grid]).values())
    return (flops["encode"] + flops["prefill"]) / speed + (task.new_tokens - 1) * (read + cache) / bandwidth


def main():
    run(command, arguments)


if __name__ == "__main__":
    main()
