"""Trains the bundled checkpoint from random weights: `python -m scenes.train`.

In every step each worker draws new scenes of one ratio of tiles, reads their conversations with the model and
learns the answers; the workers share gradients. Weights are kept in fp32 and used in bf16. Progress goes to
the terminal and to RUN/log.csv. Every few minutes the state goes to RUN/state.pt, from which the same command
continues. At the end the weights are written to OUT in the official layout. On 2 CPU cores this takes about
two hours.
"""
import argparse
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cli.options import Parser
from model.config import Config
from model.llama_vision import LlamaVision
from model.vision import VisionEncoder
from scenes.draw import RATIOS
from scenes.lessons import Batch, Lessons, PatchReader
from scenes.tiny import tiny_config, train_tokenizer, write_folder
from weights import save_model
from weights.files import replacing
from weights.images import ImageProcessor

GATE = 1.0                  # all tanh gates stay there: trained ones close, and the first layer stops reading
FIRST_ALONE = 0.2           # share of steps with the later cross-attention layers closed: the first must read
VISION_FIRST = 0.4          # share of steps in which only the vision encoder learns, from the patches
LENGTH = 128                # text tokens of a conversation
LOG_EVERY, SAVE_EVERY = 100, 500                # steps


def arguments() -> argparse.Namespace:
    parser = Parser("python -m scenes.train", "Trains the bundled checkpoint from random weights.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("weights/tiny"), metavar="DIR", help="folder of the checkpoint")
    add("--run", type=Path, default=Path("runs/tiny"), metavar="DIR", help="folder of log and state")
    add("--steps", type=int, default=9000, metavar="N", help="default 9000")
    add("--images", type=int, default=28, metavar="N", help="a step, over all workers; default 28")
    add("--workers", type=int, metavar="N", help="processes (default: one a core, at most 8; 1 on a GPU)")
    add("--device", default="cpu", metavar="D", help="default cpu")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    add("--compile", action="store_true", help="torch.compile the layers, for long runs")
    return parser.parse_args()


def initialise(model: LlamaVision):
    """Scaled normal weights, open gates, and position tables that say from the start where a patch is."""
    depth = len(model.language_model.layers)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            residual = name.endswith(("o_proj", "down_proj", "fc2"))
            scale = 1.4 / math.sqrt(2 * depth) if residual else 1
            nn.init.normal_(module.weight, std=scale * fan_in ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if is_gate(name):
            nn.init.constant_(parameter, GATE)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=0.5)
    vision = model.vision_model
    nn.init.normal_(vision.class_embedding, std=0.75)
    nn.init.normal_(vision.gated_positional_embedding.embedding, std=0.75)
    side, width = vision.config.patches_per_side, vision.config.hidden_size
    for ratio, (rows, columns) in enumerate(RATIOS, start=1):
        table = vision.gated_positional_embedding.tile_embedding.weight.data[ratio].view(4, -1, width)
        table[:rows * columns] = place_waves(rows, columns, side, width)


def place_waves(rows: int, columns: int, side: int, width: int) -> Tensor:
    """Sines and cosines of where each token is, in tiles and in shares of the image: [tiles, P, width]."""
    tile = torch.arange(rows * columns)
    patch = (torch.arange(side) + 0.5) / side
    y = ((tile // columns)[:, None, None] + patch[:, None]).expand(-1, side, side).flatten(1)    # in tiles
    x = ((tile % columns)[:, None, None] + patch[None]).expand(-1, side, side).flatten(1)
    frequencies = math.pi * 2.0 ** torch.linspace(-1, 2.5, width // 8)
    waves = [torch.cat(((place * scale)[..., None] * frequencies,
                        (place * scale)[..., None] * frequencies + math.pi / 2), -1).sin()
             for place, scale in ((y, 1), (x, 1), (y, 2 / rows), (x, 2 / columns))]
    return F.pad(torch.cat(waves, -1), (0, 0, 1, 0))                                   # class tokens: zeros


class Optimisers:
    """Muon for the matrices inside the layers, AdamW for everything else; one schedule for both."""

    def __init__(self, model: LlamaVision, reader: PatchReader):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if ".layers." in name and p.ndim == 2]
        inside = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in inside] + list(reader.parameters())
        self.all = [torch.optim.Muon(matrices, lr=0.007, weight_decay=0.05),
                    torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)]
        self.top = [group["lr"] for optimiser in self.all for group in optimiser.param_groups]

    def step(self, share: float, warm: float = 0.008, flat: float = 0.5):
        """One step when `share` of the run is over: warm-up, then constant, then a cosine down to 1 %."""
        fall = max(0.0, (share - flat) / (1 - flat))
        scale = min(1.0, share / warm + 1e-3) * (0.01 + 0.99 * (1 + math.cos(math.pi * fall)) / 2)
        groups = [group for optimiser in self.all for group in optimiser.param_groups]
        for group, top in zip(groups, self.top, strict=True):
            group["lr"] = top * scale
        for optimiser in self.all:
            optimiser.step()


def losses(model: LlamaVision, reader: PatchReader, batch: Batch, device: str,
           vision_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the answers, the loss of the patches, and the share of answer tokens that are right."""
    image = model.encode(batch.tiles)
    patches = reader(image.features, {name: label.to(device) for name, label in batch.patches.items()})
    if vision_only:
        return torch.zeros(()), patches, torch.zeros(())
    said = batch.targets >= 0
    targets, weights = batch.targets[said].to(device), batch.weights[said].to(device)
    logits = model.lm_head(model.hidden(batch.input_ids.to(device), image)[said.to(device)]).float()
    each = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.argmax(-1) == targets).float().mean()
    return (each * weights).sum() / weights.sum(), patches, right


def share_gradients(parameters: list[nn.Parameter], workers: int):
    parameters = [p for p in parameters if p.grad is not None]
    if workers > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= workers
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(grad.view_as(p))
    nn.utils.clip_grad_norm_(parameters, 1.0)


class Student:
    """The model that learns, in fp32 (`master`) and in bf16 (`model`), and its optimisers.

    If a `vision` encoder is given, its weights are used and do not learn.
    """

    def __init__(self, args: argparse.Namespace, config: Config, workers: int,
                 vision: VisionEncoder | None = None):
        self.device = args.device
        self.workers = workers
        self.master = LlamaVision(config)
        initialise(self.master)
        if vision is not None:
            self.master.vision_model.load_state_dict(vision.state_dict())
        self.master.to(self.device)
        self.reader = PatchReader(config.text.hidden_size).to(self.device)
        self.model = LlamaVision(config).to(self.device, torch.bfloat16)
        for network in self.master, self.model:
            for name, parameter in network.named_parameters():
                fixed = is_gate(name) or (vision is not None and name.startswith("vision_model."))
                parameter.requires_grad_(not fixed)
        if args.compile:
            vision = self.model.vision_model
            for layer in (*vision.transformer.layers, *vision.global_transformer.layers,
                          *self.model.language_model.layers):
                layer.compile(dynamic=False)
        self.optimisers = Optimisers(self.master, self.reader)
        pairs = zip(self.master.parameters(), self.model.parameters(), strict=True)
        self.learned = [(p, q) for p, q in pairs if p.requires_grad]

    def learn(self, batch: Batch, share: float, vision_only: bool, first_alone: bool) -> list[float]:
        """One step when `share` of the run is over; returns the three numbers of `losses`."""
        self.model.load_state_dict(self.master.state_dict())
        if first_alone:
            shut_later_layers(self.model)
        self.model.zero_grad()
        self.reader.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):      # at this length faster than a fused kernel's backward
            answers, patches, right = losses(self.model, self.reader, batch, self.device, vision_only)
        (answers + patches).backward()
        for p, q in self.learned:
            p.grad = None if q.grad is None else q.grad.float()
        share_gradients([p for p, _ in self.learned] + list(self.reader.parameters()), self.workers)
        self.optimisers.step(share)
        return [answers.item(), patches.item(), right.item()]

    def save(self, path: Path, step: int):
        state = {"step": step, "model": self.master.state_dict(), "reader": self.reader.state_dict(),
                 "optimisers": [optimiser.state_dict() for optimiser in self.optimisers.all]}
        with replacing(path) as partial:
            torch.save(state, partial)

    def resume(self, path: Path) -> int:
        """Load a saved state, if there is one; returns the step to continue from."""
        if not path.exists():
            return 0
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.master.load_state_dict(state["model"])
        self.reader.load_state_dict(state["reader"])
        for optimiser, held in zip(self.optimisers.all, state["optimisers"], strict=True):
            optimiser.load_state_dict(held)
        return state["step"]


def train(rank: int, workers: int, args: argparse.Namespace):
    """One of the workers: from the first step, or the last saved one, to the end."""
    torch.manual_seed(args.seed)
    if args.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if workers > 1:
        meet = f"file://{(args.run / 'meet').resolve()}"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    student = Student(args, tiny_config(), workers)
    processor = ImageProcessor.from_folder(args.out, tiny_config().vision)
    lessons = Lessons(train_tokenizer(), processor, LENGTH)
    start = student.resume(args.run / "state.pt")
    images = args.images // workers
    log = Log(args.run / "log.csv") if rank == 0 else None
    began = time.time()
    for step in range(start, args.steps):
        ratio, first_alone = plan(args.seed, step, rank)
        vision_only = step < VISION_FIRST * args.steps
        first = (step * workers + rank) * images
        batch = lessons.batch("train", first, images, ratio, args.seed, crowded=vision_only)
        values = student.learn(batch, step / args.steps, vision_only, first_alone)
        if log is not None:
            log.add(step + 1, args.steps, first_alone, *values)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
                student.save(args.run / "state.pt", step + 1)
    if log is not None:
        save_model(student.master.to(torch.bfloat16), args.out)
        print(f"\n{args.out}: {args.steps - start} steps in {(time.time() - began) / 60:.0f} minutes")


def plan(seed: int, step: int, rank: int) -> tuple[tuple[int, int], bool]:
    """The ratio of a worker's images, and whether the first layer reads alone. Workers get equal work."""
    chance = random.Random(f"{seed}:{step}")
    tiles = chance.choice([rows * columns for rows, columns in RATIOS])
    first_alone = chance.random() < FIRST_ALONE
    ratios = [ratio for ratio in RATIOS if ratio[0] * ratio[1] == tiles]
    return random.Random(f"{seed}:{step}:{rank}").choice(ratios), first_alone


def shut_later_layers(model: LlamaVision):
    """Set the gates of all cross-attention layers but the first to 0: tanh(0) = 0, so they do nothing."""
    for layer in model.language_model.cross_layers[1:]:
        layer.cross_attn_attn_gate.data.zero_()
        layer.cross_attn_mlp_gate.data.zero_()


def is_gate(name: str) -> bool:
    return name.endswith(("gate", "gate_attn", "gate_ffn"))            # not gate_proj: that is in SwiGLU


class Log:
    """Running means on the terminal and in a CSV file, one line every LOG_EVERY steps."""

    def __init__(self, path: Path):
        self.path = path
        self.began = time.time()
        self.sums = [0.0] * 3
        self.count = 0
        if not path.exists():
            path.write_text("step,minutes,answer_loss,patch_loss,token_accuracy\n")

    def add(self, step: int, steps: int, alone: bool, *values: float):
        if not alone:
            self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
            self.count += 1
        if step % LOG_EVERY == 0 and self.count:
            means = [total / self.count for total in self.sums]
            minutes = (time.time() - self.began) / 60
            with self.path.open("a") as file:
                file.write(f"{step},{minutes:.2f},{means[0]:.4f},{means[1]:.4f},{means[2]:.4f}\n")
            print(f"step {step}/{steps}  {minutes:.1f} min  answers {means[0]:.3f}  patches {means[1]:.3f}  "
                  f"tokens right {means[2]:.3f}", flush=True)
            self.sums = [0.0] * 3
            self.count = 0


def main():
    args = arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "meet").unlink(missing_ok=True)
    write_folder(args.out)
    workers = args.workers or (min(8, os.cpu_count() or 1) if args.device == "cpu" else 1)
    if workers == 1:
        train(0, 1, args)
    else:
        torch.multiprocessing.spawn(train, (workers, args), nprocs=workers)


if __name__ == "__main__":
    main()
