"""How answers are printed: the text as it is made on stdout, what it took on stderr, or everything as JSON.

`ask` is `Assistant.answer` with everything set but the conversations. `pruner` is None if none was asked for.
"""
import argparse
import json
import sys
from collections.abc import Callable

from cli.program import write
from cli.terminal import say_wrapped, size, took
from model.answer import Answer, EncodedImages
from pruning import Pruner
from weights.system_text import FOLDED, fold_system
from weights.tokenizer import ChatTokenizer, Detokenizer

Ask = Callable[..., Answer]


def print_answers(args: argparse.Namespace, tokenizer: ChatTokenizer, ask: Ask, encoded: EncodedImages,
                  pruner: Pruner | None, conversations: list[list[dict]]):
    """One answer is printed as it is made; those of a batch in order at the end, a line each."""
    live = len(conversations) == 1 and not args.json
    written = [fold_system(tokenizer.template, conversation, args.date) for conversation in conversations]
    answer = stream(tokenizer, ask, written[0]) if live else ask(written)
    if written != conversations:
        say_wrapped(FOLDED)
    named = None if args.prune is None else str(pruner)         # one that only draws a map has no name
    if args.json:
        return write_json(as_json(args.model, answer, encoded, named))
    if not live:
        write("".join(text + "\n" for text in answer.texts))
    say_model(args.model)
    say_cost(answer, encoded, named)


def stream(tokenizer: ChatTokenizer, ask: Ask, conversation: list[dict]) -> Answer:
    """Answer a conversation, and print the answer as it is made."""
    live = Live(tokenizer)
    answer = ask([conversation], emit=live.push)
    live.finish(answer.texts[0])
    return answer


class Live:
    """Prints an answer as it is made; `text` is what was printed. `push` is the `emit` of one sequence."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.detokenizer = Detokenizer(tokenizer)
        self.text = ""

    def push(self, sequence: int, token: int):
        piece = self.detokenizer.push(token)
        self.text += piece
        write(piece)

    def finish(self, text: str):
        """The rest of the answer, which begins with what was printed, and the end of its line."""
        rest = text[len(self.text):]
        self.text = text
        write(rest + "\n")


# ----- what an answer took


def as_json(model: str, answer: Answer, encoded: EncodedImages, pruner: str | None) -> dict:
    """One object; a batch has lists where one prompt has its answer, token ids and kept tokens."""
    kept = [round(mean(layers)) for layers in answer.kept]
    one = len(answer.texts) == 1
    return {"model": model,
            "answer": answer.texts[0] if one else answer.texts,
            "token_ids": answer.tokens[0] if one else answer.tokens,
            "pruner": pruner,
            "image_tokens": {"slots": encoded.slots, "real": encoded.real, "kept": kept[0] if one else kept},
            "kept_by_layer": answer.kept[0] if one else answer.kept,
            "answered_early": answer.early,
            "ms": {part: round(ms, 2) for part, ms in answer.ms.items()},
            "tokens_per_second": round(answer.tokens_per_second, 2),
            "image_kv_bytes": answer.image_kv_bytes, "image_kv_stored_bytes": answer.image_kv_stored,
            "text_kv_bytes": answer.text_kv_bytes,
            "peak_memory_bytes": answer.peak_memory, "mapped_memory_bytes": answer.mapped_memory}


def write_json(data: dict):
    """One line on stdout; letters that it cannot hold are escaped as JSON does it."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data)
    write(text + "\n")


def say_model(model: str):
    if model == "tiny":
        say_wrapped("tiny: the bundled toy checkpoint, which knows only drawn shapes; for the real one: "
                    "--model meta-llama/Llama-3.2-11B-Vision-Instruct")
    else:
        say_wrapped(f"model {model}")


def say_cost(answer: Answer, encoded: EncodedImages, pruner: str | None):
    """Image tokens, bytes, times and memory, on one or two lines, or as many as a narrow terminal needs."""
    image = ""
    if encoded.tokens is not None:
        say_wrapped(f"image tokens {encoded.slots} slots -> {encoded.real} real"
                    f"{kept_words(answer, encoded, pruner)}")
        more = ""
        if answer.image_kv_stored > answer.image_kv_bytes:
            more = f" of {size(answer.image_kv_stored)} stored"
        image = f"image KV {size(answer.image_kv_bytes)}{more}, encode {took(answer.ms['encode'])}, "
    say_wrapped(f"{image}prefill {took(answer.ms['prefill'])}, {speed(answer.tokens_per_second)}"
                f"{memory_words(answer)}")


def speed(tokens_per_second: float) -> str:
    """Large models on small machines take seconds for a token."""
    return f"{tokens_per_second:.{1 if tokens_per_second >= 1 else 3}f} tok/s"


def memory_words(answer: Answer) -> str:
    """What the system tells: a GPU and some systems give one figure, and some none."""
    if not answer.peak_memory:
        return ""
    mapped = "" if answer.mapped_memory is None else f" and {size(answer.mapped_memory)} of mapped files"
    return f", peak memory {size(answer.peak_memory)}{mapped}"


def kept_words(answer: Answer, encoded: EncodedImages, pruner: str | None) -> str:
    """What became of the real image tokens: those of earlier images are out of sight, others are pruned."""
    seen = mean(answer.seen)
    words = ""
    if round(seen) != encoded.tokens.features.shape[1]:
        words = f" -> {seen:.0f} in sight"
    if pruner is None:
        return words
    if answer.early:
        pruner += f"; {len(answer.early)} of {len(answer.tokens)} answered by the guide alone"
    layers = [mean(column) for column in zip(*answer.kept, strict=True)]
    by_layer = ""
    if len({round(layer) for layer in layers}) > 1:
        by_layer = f"by layer {' '.join(f'{layer:.0f}' for layer in layers)}; "
    return f"{words} -> {mean(layers):.0f} kept ({by_layer}{pruner})"


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
