"""What an answer took: for people on stderr, and as JSON.

`generate.generate` fills an Answer, `generate.Assistant.encode_images` an EncodedImages; the rest puts both into
words. `pruner` is what describes one, None where none was asked for. stdout belongs to answers alone.
"""
import sys
import time
from dataclasses import dataclass, field

import torch

from model.image_tokens import ImageTokens, Tiles


@dataclass
class EncodedImages:
    """The encoded images that a question is about."""
    tiles: Tiles
    tokens: ImageTokens | None
    ms: float                                   # that encoding took
    slots: int                                  # image tokens of all tiles, used or not
    real: int                                   # those of the tiles that the images fill

    def expand(self, batch: int) -> ImageTokens | None:
        """Its tokens for every row of a batch."""
        return None if self.tokens is None else self.tokens.expand(batch)


@dataclass
class Answer:
    """What `generate` leaves: the new tokens of each row, and what they cost."""
    tokens: list[list[int]]                     # without the stop token
    seen: list[int]                             # image tokens that each row's new text could have seen
    kept: list[list[float]]                     # those it did see, of each row, per cross-attention layer
    ms: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})   # of each part
    decoded: int = 0                            # tokens that decoding made, stop tokens among them
    early: list[int] = field(default_factory=list)          # rows that a smaller model answered
    image_kv_bytes: int = 0                     # that decoding reads
    image_kv_stored: int = 0                    # more, where a pruner chooses from all of it at every step
    text_kv_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, all rows together; 0 where every answer ended with its first token."""
        return self.decoded / self.ms["decode"] * 1000 if self.decoded else 0.0


def drain(device: torch.device):
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Clock:
    """Milliseconds between laps, with the device's queue drained."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        drain(self.device)
        now, before = time.perf_counter(), self.last
        self.last = now
        return (now - before) * 1000


def as_json(model: str, texts: list[str], answer: Answer, encoded: EncodedImages, pruner: str | None) -> dict:
    """One object; a batch has lists where one prompt has its answer, token ids and kept tokens."""
    one, kept = len(texts) == 1, [round(mean(row)) for row in answer.kept]
    return {"model": model, "answer": texts[0] if one else texts,
            "token_ids": answer.tokens[0] if one else answer.tokens,
            "pruner": pruner,
            "image_tokens": {"slots": encoded.slots, "real": encoded.real, "kept": kept[0] if one else kept},
            "kept_by_layer": answer.kept[0] if one else answer.kept, "answered_early": answer.early,
            "ms": {part: round(ms, 2) for part, ms in answer.ms.items()},
            "tokens_per_second": round(answer.tokens_per_second, 2), "image_kv_bytes": answer.image_kv_bytes,
            "image_kv_stored_bytes": answer.image_kv_stored, "text_kv_bytes": answer.text_kv_bytes,
            "peak_memory_bytes": peak_memory()}


def say_model(model: str):
    say("tiny: the bundled toy checkpoint, which knows only drawn shapes; for the real one: "
        "--model meta-llama/Llama-3.2-11B-Vision-Instruct" if model == "tiny" else f"model {model}")


def say_cost(answer: Answer, encoded: EncodedImages, pruner: str | None):
    if encoded.tokens is not None:
        say(f"image tokens {encoded.slots} slots -> {encoded.real} real{kept_words(answer, encoded, pruner)}")
        more = f" of {size(answer.image_kv_stored)} held" * (answer.image_kv_stored > answer.image_kv_bytes)
        say(f"image KV {size(answer.image_kv_bytes)}{more}, encode {answer.ms['encode']:.0f} ms, ", end="")
    say(f"prefill {answer.ms['prefill']:.0f} ms, {answer.tokens_per_second:.1f} tok/s, "
        f"peak memory {size(peak_memory())}")


def kept_words(answer: Answer, encoded: EncodedImages, pruner: str | None) -> str:
    """What became of the real image tokens: those of earlier images are out of sight, others are pruned."""
    seen, words = mean(answer.seen), ""
    if round(seen) != encoded.tokens.features.shape[1]:
        words = f" -> {seen:.0f} in sight"
    if pruner is None:
        return words
    if answer.early:
        pruner += f"; {len(answer.early)} of {len(answer.tokens)} answered by the guide alone"
    layers = [mean(column) for column in zip(*answer.kept, strict=True)]
    several = len({round(layer) for layer in layers}) > 1
    by_layer = f"by layer {' '.join(f'{layer:.0f}' for layer in layers)}; " if several else ""
    return f"{words} -> {mean(layers):.0f} kept ({by_layer}{pruner})"


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def peak_memory() -> int:
    """The most bytes held so far: on the GPU if one is in use, else by the process; 0: unknown (Windows)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size(count: float) -> str:
    """Bytes as people read them: 3 digits and a unit."""
    for unit in "B", "kB", "MB":
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def write(text: str):
    print(text, end="", flush=True)


def say(text: str, end: str = "\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def fail(message: object):
    """One line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)
