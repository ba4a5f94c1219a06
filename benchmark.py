"""What a pruner's own work costs, at the layer shapes of the big models: `python benchmark.py`.

A slice of the decoder with random weights, one self-attention and one cross-attention layer, reads a prompt
about an image; the pruner acts at the cross-attention layer. Its own work (attention weights, choosing,
taking the features that are kept) is timed apart from the layers, in turns with them, and compared with the
slice and with the prefill of the whole decoder: in 11B, 32 and 8 of these layers. All of them are charged for
all image tokens: what pruning saves is not counted. Medians; only ratios matter.
"""
import argparse
import statistics
import warnings
from dataclasses import replace

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # importing torch would say so

import torch

from generate import Clock, Parser, parse_pruner
from model.config import TextConfig
from model.decoder import Decoder
from model.image_tokens import ImageTokens, Queries
from model.layers import rotary_angles
from pruning import Pruner
from report import fail
from weights import parse_device, parse_dtype

MODELS = {"11b": TextConfig(),
          "90b": TextConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                            num_hidden_layers=100, cross_attention_layers=tuple(range(3, 100, 5)))}


class Slice:
    """A self-attention and a cross-attention layer, the text and the image that go through them."""

    def __init__(self, config: TextConfig, text: int, image: int, device: torch.device, dtype: torch.dtype):
        with torch.device("meta"):
            decoder = Decoder(replace(config, num_hidden_layers=2, cross_attention_layers=(1,), vocab_size=8))
        self.decoder = decoder.to(dtype).to_empty(device=device)
        for parameter in self.decoder.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        make = {"device": device, "dtype": dtype}
        self.x, features = torch.randn(1, text, config.hidden_size, **make), torch.randn(
            1, image, config.hidden_size, **make)
        self.image = ImageTokens(features, torch.zeros(1, image, 4, dtype=torch.long, device=device))
        self.angles = rotary_angles(torch.arange(text, device=device)[None], config)
        self.seen = torch.tensor([0, 1], device=device).expand(1, text, 2)

    @torch.inference_mode()
    def run(self, pruner: Pruner) -> dict[str, float]:
        """Milliseconds of the two layers and of the pruner's moments between them."""
        alone, cross = self.decoder.layers
        clock = Clock(self.x.device)
        alone(self.x, self.angles)
        ms = {"self-attention layer": clock.lap()}
        q, kv = cross.queries(self.x), cross.cross_attn.keys_values(self.image)
        cross(self.x, q, kv, None, None)
        ms["cross-attention layer"] = clock.lap()
        pruner.prefilled([pruner.layer(0, Queries(q, self.seen), self.image, kv)[1]])
        ms["pruner"] = clock.lap()
        return ms


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python benchmark.py", description="What a pruner's own work costs in prefill.")
    add = parser.add_argument
    add("--prune", default="trimmed_llama", metavar="P", help="the method; default trimmed_llama")
    add("--keep", metavar="R", help="its keep ratio")
    add("--set", action="append", default=[], metavar="K=V", help="another knob of it")
    add("--shape", choices=MODELS, default="11b", help="whose layers; default 11b")
    add("--image-tokens", type=int, default=6404, metavar="N", help="default 6404: four tiles of 560 pixels")
    add("--text-tokens", type=int, default=128, metavar="T", help="default 128")
    add("--repeat", type=int, default=11, metavar="N", help="default 11, after one to warm up")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D")
    add("--dtype", default="bf16", metavar="T", help="default bf16")
    return parser.parse_args()


def command(args: argparse.Namespace):
    for name in "image_tokens", "text_tokens", "repeat":
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    pruner, config = parse_pruner(args), MODELS[args.shape]
    layers = Slice(config, args.text_tokens, args.image_tokens, parse_device(args.device),
                   parse_dtype(args.dtype))
    runs = [layers.run(pruner) for _ in range(args.repeat + 1)][1:]
    ms = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    cross = len(config.cross_attention_layers)
    alone, looking, own = ms.values()
    whole = (config.num_hidden_layers - cross) * alone + cross * looking
    print(f"{pruner}\n{args.shape} layers, {args.image_tokens} image and {args.text_tokens} text tokens, "
          f"{args.device}, {args.dtype}, torch {torch.__version__}, median of {args.repeat}")
    for part, value in ms.items():
        print(f"{part:22} {value:8.2f} ms")
    print(f"the pruner's own work: {own / (alone + looking):.1%} of these two layers, {own / whole:.2%} of "
          f"the prefill of all {config.num_hidden_layers} ({whole:.0f} ms)")


def main():
    try:
        command(arguments())
    except (ValueError, torch.OutOfMemoryError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
