"""Ask Llama-3.2-Vision about a picture: `python generate.py --image x.png --prompt "What is this?"`.

    picture ── ImageProcessor ─► Tiles ── encode ─► ImageTokens ─┐
    question ── Prompter ─► token ids ───────────────────────────┴ prefill ─► logits ─ sample ─► token ─► text
                                                                                ▲                 │
                                                                                └──── decode ◄────┘

`generate` is that loop; read it first. `Assistant` holds the parts of a checkpoint, and the rest is the
command line: the answer alone on stdout, everything about it on stderr.
"""
import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")     # importing torch would say so

import torch
from PIL import Image
from torch import Tensor

from model.decoder import ImageTokens
from model.image import ImageProcessor, Tiles, open_picture
from model.llama_vision import LlamaVision
from model.prompt import Prompter, Stream, check_length, messages
from model.sampler import GREEDY, Sampler
from weights import find_checkpoint, load_model, parse_device, parse_dtype


@dataclass
class Answer:
    """What `generate` leaves: the new tokens of each row, and what they cost."""
    tokens: list[list[int]]                     # without the stop token
    ms: dict[str, float]                        # milliseconds of each part
    decoded: int = 0                            # tokens that decoding made, stop tokens among them
    image_kv_bytes: int = 0
    text_kv_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, all rows together; 0 where every answer ended with its first token."""
        return self.decoded / self.ms["decode"] * 1000 if self.decoded else 0.0


@torch.inference_mode()
def generate(model: LlamaVision, prompts: list[list[int]], image: ImageTokens | None, max_new_tokens: int,
             stop_ids: tuple[int, ...], sampler: Callable[[Tensor], Tensor] = GREEDY,
             emit: Callable[[int, int], None] = lambda row, token: None) -> Answer:
    """Continue every prompt to a stop token or `max_new_tokens`; each new token goes to `emit(row, token)`.

    `image` is what `model.encode` made of the pictures. Raises ValueError where a prompt does not fit in.
    """
    lengths = [len(prompt) for prompt in prompts]
    for length in lengths:
        check_length(length, max_new_tokens, model.config.text.max_position_embeddings)
    device, pad = model.lm_head.weight.device, model.config.text.pad_token_id
    input_ids = torch.tensor([ids + [pad] * (max(lengths) - len(ids)) for ids in prompts], device=device)

    clock = Clock(device)
    logits, cache = model.prefill(input_ids, lengths, image, max_new_tokens)
    answer = Answer([[] for _ in prompts], {"prefill": clock.lap()})
    running = set(range(len(prompts)))
    for step in range(max_new_tokens):
        tokens = sampler(logits)
        for row, token in enumerate(tokens.tolist()):
            if row in running and token in stop_ids:
                running.remove(row)
            elif row in running:
                answer.tokens[row].append(token)
                emit(row, token)
        if not running or step + 1 == max_new_tokens:
            break
        logits = model.decode(tokens, cache)            # rows that have ended run along, unheard
        answer.decoded += len(running)
    answer.ms["decode"] = clock.lap()
    answer.image_kv_bytes, answer.text_kv_bytes = cache.image_bytes(), cache.text_bytes()
    return answer


class Clock:
    """Milliseconds between laps, with the device's queue drained."""

    def __init__(self, device: torch.device):
        self.cuda, self.last = device.type == "cuda", time.perf_counter()

    def lap(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        now, before = time.perf_counter(), self.last
        self.last = now
        return (now - before) * 1000


@dataclass
class Picture:
    """The encoded pictures that a question is about."""
    tiles: Tiles
    tokens: ImageTokens | None
    ms: float                                   # that encoding took
    counts: dict[str, int]                      # image tokens: slots of all tiles, real ones, those kept


class Assistant:
    """A checkpoint ready to answer: the model, its prompt format and its image processing."""

    def __init__(self, source: str, device: str | None = None, dtype: str | None = None,
                 revision: str | None = None):
        began = time.perf_counter()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device, dtype = parse_device(device), parse_dtype(dtype)        # before a download of an hour
        folder = find_checkpoint(source, revision)
        self.model = load_model(folder, device, dtype)
        self.prompter = Prompter.from_folder(folder, self.model.config)
        self.processor = ImageProcessor.from_folder(folder, self.model.config.vision)
        self.load_ms = (time.perf_counter() - began) * 1000

    def look(self, pictures: list[Image.Image]) -> Picture:
        """Encode RGB pictures, once for any number of questions."""
        tiles = self.processor(pictures)
        clock = Clock(self.model.lm_head.weight.device)
        with torch.inference_mode():
            tokens = self.model.encode([tiles])
        real = self.model.image_tokens(tiles.grid.tolist())
        slots = len(tiles) * self.model.image_tokens([(self.model.config.vision.max_num_tiles, 1)])
        return Picture(tiles, tokens, clock.lap(), {"slots": slots, "real": real, "kept": real})

    def ask(self, conversations: list[list[dict]], picture: Picture, max_new_tokens: int,
            sampler: Sampler = GREEDY, date: str | None = None,
            emit: Callable[[int, int], None] = lambda row, token: None) -> Answer:
        """Answer the last turn of each conversation about one picture (or several pictures, or none)."""
        prompts = [self.prompter.encode(conversation, date) for conversation in conversations]
        image = None if picture.tokens is None else picture.tokens.expand(len(prompts))
        answer = generate(self.model, prompts, image, max_new_tokens, self.prompter.stop_ids, sampler, emit)
        answer.ms = {"load": self.load_ms, "encode": picture.ms, **answer.ms}
        return answer


# ----- the command line


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        fail(message)


def fail(message: object):
    """One line on stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python generate.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Ask Llama-3.2-Vision about pictures; no --prompt on a terminal: a chat.",
                    usage="%(prog)s [--image PATH]... [--prompt TEXT]... [options]", epilog=EXAMPLES)
    add = parser.add_argument
    add("--model", default="tiny", metavar="M", help="'tiny' (bundled, the default), a folder, or a hub id")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--image", action="append", default=[], metavar="PATH", help="a picture; several go into one prompt")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a question; several make a batch")
    add("--system", metavar="TEXT", help="a system message")
    add("--date", metavar="TEXT", help="today's date, for chat templates that write it")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    add("--temperature", type=float, default=0.0, metavar="X", help="default 0: always the likeliest token")
    add("--top-p", type=float, default=0.9, metavar="X", help="sample among the likeliest of this mass")
    add("--seed", type=int, default=0, metavar="N", help="of sampling")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--dtype", metavar="T", help="bf16, fp16, fp32; default: the checkpoint's")
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


EXAMPLES = """examples:
  python generate.py --image examples/shapes.png --prompt "What is written on the circle?"
  python generate.py --image examples/sign.png --prompt "What does the sign say?" --json"""


def command(args: argparse.Namespace):
    """Everything that can be wrong with the arguments is found before anything is printed."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    sampler = Sampler(args.temperature, args.top_p, args.seed)
    chatting = not args.prompt and sys.stdin is not None and sys.stdin.isatty()
    if chatting and args.json:
        raise ValueError("--json needs a --prompt: a chat is for people")
    pictures = [open_picture(path) for path in args.image]
    prompts = args.prompt or ([] if chatting else [piped_prompt(bool(pictures))])
    assistant = Assistant(args.model, args.device, args.dtype, args.revision)
    picture = assistant.look(pictures)
    if chatting:
        chat(args, assistant, picture, sampler)
    else:
        answer_all(args, assistant, picture, sampler, prompts)


def piped_prompt(has_picture: bool) -> str:
    """The prompt where none was given and nobody sits at a terminal."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read().strip()        # None: closed by the caller
    except UnicodeDecodeError:
        raise ValueError("the prompt on standard input is not valid UTF-8 text") from None
    if not text and not has_picture:
        raise ValueError("nothing to answer: give --prompt TEXT, and --image PATH to ask about a picture")
    return text or "Describe the picture."


def answer_all(args: argparse.Namespace, assistant: Assistant, picture: Picture, sampler: Sampler,
               prompts: list[str]):
    """One answer is streamed; those of a batch are printed in order, a line each."""
    stream, live = Stream(assistant.prompter), len(prompts) == 1 and not args.json

    def emit(row: int, token: int):
        if live:
            write(stream.push(token))

    conversations = [messages(prompt, len(args.image), args.system) for prompt in prompts]
    answer = assistant.ask(conversations, picture, args.max_new_tokens, sampler, args.date, emit)
    texts = [assistant.prompter.decode(tokens) for tokens in answer.tokens]
    if args.json:
        write(json.dumps(report(args.model, texts, answer, picture), ensure_ascii=False) + "\n")
        return
    write(stream.flush() + "\n" if live else "".join(text + "\n" for text in texts))
    say_model(args.model)
    say_cost(answer, picture)


def chat(args: argparse.Namespace, assistant: Assistant, picture: Picture, sampler: Sampler):
    """Questions and answers until the input ends; all see the pictures, which were encoded once."""
    say_model(args.model)
    say("Ask; an empty line or Ctrl-D ends.")
    history = [] if args.system is None else [{"role": "system", "content": args.system}]
    images = len(args.image)
    while question := ask_person():
        asked = [*history, *messages(question, images)]
        stream = Stream(assistant.prompter)
        try:
            answer = assistant.ask([asked], picture, args.max_new_tokens, sampler, args.date,
                                   lambda row, token, stream=stream: write(stream.push(token)))
        except ValueError as error:             # too long, say: the chat goes on without this question
            say(f"error: {error}")
            continue
        write(stream.flush() + "\n")
        say_cost(answer, picture)
        history = [*asked, {"role": "assistant", "content": assistant.prompter.decode(answer.tokens[0])}]
        images = 0                              # they stand in the first question


def ask_person() -> str:
    say("> ", end="")
    try:
        return input().strip()
    except EOFError:
        say("")
        return ""


def report(model: str, texts: list[str], answer: Answer, picture: Picture) -> dict:
    """What --json prints; a batch has a list of answers and of token ids."""
    one = len(texts) == 1
    return {"model": model, "answer": texts[0] if one else texts,
            "token_ids": answer.tokens[0] if one else answer.tokens, "image_tokens": picture.counts,
            "ms": {part: round(ms, 2) for part, ms in answer.ms.items()},
            "tokens_per_second": round(answer.tokens_per_second, 2), "image_kv_bytes": answer.image_kv_bytes,
            "text_kv_bytes": answer.text_kv_bytes, "peak_memory_bytes": peak_memory()}


def say_model(model: str):
    say("tiny: the bundled toy checkpoint, which knows only drawn shapes; for the real one: "
        "--model meta-llama/Llama-3.2-11B-Vision-Instruct" if model == "tiny" else f"model {model}")


def say_cost(answer: Answer, picture: Picture):
    if len(picture.tiles):
        slots = picture.tiles.pixels.shape[:2].numel()
        say(f"image tokens {slots} slots {picture.counts['slots']} -> real {picture.counts['real']}, "
            f"image KV {size(answer.image_kv_bytes)}, encode {answer.ms['encode']:.0f} ms")
    say(f"prefill {answer.ms['prefill']:.0f} ms, {answer.tokens_per_second:.1f} tok/s, "
        f"peak memory {size(peak_memory())}")


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


def main():
    try:
        command(arguments())
    except (ValueError, torch.OutOfMemoryError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:                     # the reader of our output has gone; so do we, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
