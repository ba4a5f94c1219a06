"""Ask Llama-3.2-Vision about an image: `python generate.py --image x.png --prompt "What is this?"`.

    image ── ImageProcessor ─► Tiles ── encode ─► ImageTokens ─┐
    question ── Prompter ─► token ids ───────────────────────────┴ prefill ─► logits ─ sample ─► token ─► text
                                                                                ▲                 │
                                                                                └──── decode ◄────┘

`generate` is that loop, with the hooks at which a pruner may act; read it first. `Assistant` holds the
parts of a checkpoint. The rest is the command line: answers on stdout, everything about them on stderr.
"""
import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import program

program.begin(__name__)

import torch
from PIL import Image
from torch import Tensor

from cli import (
    Parser,
    as_json,
    catalogue,
    chat,
    check_output,
    parse_pruner,
    piped_prompt,
    real_number,
    say_cost,
    say_model,
    whole_number,
    write_json,
    writing,
)
from model.answer import Answer, EncodedImages
from model.cache import Cache
from model.clock import Clock
from model.config import padding_id
from model.image_tokens import ImageTokens, kv_bytes
from model.llama_vision import LlamaVision
from model.sampling import GREEDY, Arriving, Sampler, one_ahead
from program import say, write
from pruning import Prompts, Pruner
from pruning.recorder import Recorder
from pruning.visualize import attention_map, kept_map
from weights import find_checkpoint, load_model, parse_device, parse_dtype
from weights.images import ImageProcessor, open_image
from weights.tokenizer import ChatTokenizer, Detokenizer, check_length, messages

WARM_UP_TOKENS = 5          # the first steps of a CUDA graph are not its fast ones


@torch.inference_mode()
def generate(model: LlamaVision, prompts: list[list[int]], image: ImageTokens | None, max_new_tokens: int,
             stop_ids: tuple[int, ...], sampler: Callable[[Tensor], Tensor] = GREEDY,
             emit: Callable[[int, int], None] = lambda row, token: None, pruner: Pruner | None = None,
             decode: Callable[[Tensor, Cache], Tensor] | None = None) -> Answer:
    """Continue every prompt to a stop token or `max_new_tokens`; each new token goes to `emit(row, token)`.

    `image` is what `model.encode` made of the images; `decode` is `model.decode` if not given, or Compiled
    of it. Raises ValueError where a prompt does not fit in, or the pruner's options do not fit the model.
    """
    lengths = [len(prompt) for prompt in prompts]
    for length in lengths:
        check_length(length, max_new_tokens, model.config.text.max_position_embeddings)
    device, pad = model.lm_head.weight.device, padding_id(model.config)
    input_ids = torch.tensor([ids + [pad] * (max(lengths) - len(ids)) for ids in prompts], device=device)
    seen = [0] * len(prompts) if image is None else model.tokens_seen(input_ids, lengths, image)
    if pruner is None or pruner.keeps_all or image is None:
        pruner = Pruner()                                                       # bit for bit the whole model
    if "vision" in pruner.needs and image.vision is None:
        raise ValueError(f"{pruner.name} needs what the encoder knows of the image: give encode vision=True")

    clock, rows, branches, decode = Clock(device), [*range(len(prompts))], 1, decode or model.decode
    layers = len(model.language_model.cross_layers)
    answer = Answer([[] for _ in prompts], seen, [[0.0] * layers for _ in prompts])
    if image is not None:
        question = model.question(input_ids, lengths) if "question" in pruner.needs else None
        image = pruner.encoded(image, Prompts(prompts, max_new_tokens, stop_ids, question))     # hook 1
        branches = len(image.features) // len(prompts)
        if early := pruner.answered():
            for row, said in early.items():
                answer.tokens[row] = list(said)
                for token in said:
                    emit(row, token)
            rows = [row for row in rows if row not in early]
            image, input_ids, lengths = image.rows(rows), input_ids[rows], [lengths[row] for row in rows]
            answer.early = sorted(early)
    if not rows:
        answer.ms["prefill"] = clock.lap()
        return answer
    input_ids, lengths = input_ids.repeat(branches, 1), lengths * branches
    logits, cache = model.prefill(input_ids, lengths, image, max_new_tokens, pruner)            # 2 and 3
    answer.ms["prefill"] = clock.lap()
    for row, kept in zip(rows, cache.kept(), strict=False):             # those of the first branch
        answer.kept[row] = kept

    def steps(logits: Tensor) -> Iterator[Arriving]:
        for step in range(max_new_tokens):
            tokens = sampler(pruner.logits(logits))                             # 5
            yield Arriving(tokens)
            if step + 1 < max_new_tokens:
                logits = decode(tokens.repeat(branches), cache)     # ended rows run along, unheard
                cache.hold(pruner.stepped(step, cache.queries, cache.images))   # 4
                cache.hold_texts(pruner.text_cache(step, cache.texts()))

    running = set(rows)
    for step, tokens in enumerate(one_ahead(steps(logits)) if device.type == "cuda" else steps(logits)):
        answer.decoded += len(running) if step else 0
        for row, token in zip(rows, tokens.read(), strict=True):
            if row in running and token in stop_ids:
                running.remove(row)
            elif row in running:
                answer.tokens[row].append(token)
                emit(row, token)
        if not running:
            break
    answer.ms["decode"] = clock.lap()
    answer.image_kv_bytes, answer.text_kv_bytes = cache.image_bytes(), cache.text_bytes()
    answer.image_kv_stored = kv_bytes(cache.images + pruner.whole)
    return answer


class Assistant:
    """A checkpoint ready to answer: the model, its prompt format and its image processing."""

    def __init__(self, source: str, device: str | None = None, dtype: str | None = None,
                 revision: str | None = None, compile: bool = False):
        began = time.perf_counter()
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device, dtype = parse_device(device), parse_dtype(dtype)        # before a download of an hour
        folder = find_checkpoint(source, revision)
        self.model = load_model(folder, device, dtype)
        self.tokenizer = ChatTokenizer.from_folder(folder, self.model.config)
        self.processor = ImageProcessor.from_folder(folder, self.model.config.vision)
        self.decode = self.model.decode
        if compile:         # imported here, for a compiler takes seconds to import
            from model.compiled import Compiled
            self.decode = Compiled(self.model.decode, device)
        self.ms = {"load": (time.perf_counter() - began) * 1000}

    def encode_images(self, images: list[Image.Image], pruner: Pruner | None = None,
             vision: bool = False) -> EncodedImages:
        """Encode RGB images, once for any number of questions; the pruner may shrink them first. What the
        encoder knows beside is kept where it needs that, or with `vision`."""
        whole = self.processor(images)
        pruner = Pruner() if pruner is None or pruner.keeps_all else pruner
        tiles = pruner.preprocess(images, self.processor)                       # hook 0
        clock = Clock(self.model.lm_head.weight.device)
        with torch.inference_mode():
            tokens = self.model.encode([tiles], vision or "vision" in pruner.needs)
        real = self.model.image_tokens(whole.grid.tolist())
        slots = len(whole) * self.model.image_tokens([(self.model.config.vision.max_num_tiles, 1)])
        return EncodedImages(tiles, tokens, clock.lap(), slots, real)

    def answer(self, conversations: list[list[dict]], encoded: EncodedImages, max_new_tokens: int,
            sampler: Sampler = GREEDY, date: str | None = None,
            emit: Callable[[int, int], None] = lambda row, token: None, pruner: Pruner | None = None
            ) -> Answer:
        """Answer the last turn of each conversation about one image (or several images, or none).

        A pruner works on the image anew each time: what one question leaves out, the next may need.
        """
        prompts = [self.tokenizer.encode(conversation, date) for conversation in conversations]
        answer = generate(self.model, prompts, encoded.expand(len(prompts)), max_new_tokens,
                          self.tokenizer.stop_ids, sampler, emit, pruner, self.decode)
        answer.ms = {**self.ms, "encode": encoded.ms, **answer.ms}
        return answer

    def warm_up(self, rows: int, encoded: EncodedImages):
        """Compile what answers of so many rows about this image need; no answer waits for it then."""
        question = messages("?", len(encoded.tiles) if encoded.tokens is not None else 0)
        clock = Clock(self.model.lm_head.weight.device)
        prompts = [self.tokenizer.encode(question)] * rows
        generate(self.model, prompts, encoded.expand(rows), WARM_UP_TOKENS, (), decode=self.decode)
        self.ms["compile"] = clock.lap()


# ----- the command line


EXAMPLES = """examples:
  python generate.py --image examples/shapes.png --prompt "What is written on the circle?"
  python generate.py --image examples/sign.png --prompt "What does the sign say?" --json
  python generate.py --image examples/tall.png --prompt "Where is the star?" --prune fastv"""
MAP_SUFFIXES = ".png", ".jpg", ".jpeg", ".webp"


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python generate.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Ask Llama-3.2-Vision about images; no --prompt on a terminal: a chat.",
                    usage="%(prog)s [--image PATH]... [--prompt TEXT]... [options]", epilog=EXAMPLES)
    add = parser.add_argument
    add("--model", default="tiny", metavar="M", help="'tiny' (bundled, the default), a folder, or a hub id")
    add("--revision", metavar="R", help="branch, tag or commit of a hub id")
    add("--image", action="append", default=[], metavar="PATH", help="an image; several go into one prompt")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a question; several make a batch")
    add("--system", metavar="TEXT", help="a system message")
    add("--date", metavar="TEXT", help="today's date, for chat templates that write it")
    add("--max-new-tokens", type=whole_number, default=256, metavar="N", help="default 256")
    add("--temperature", type=real_number, default=0.0, metavar="X", help="default 0: the likeliest token")
    add("--top-p", type=real_number, default=0.9, metavar="X", help="sample among the likeliest of this mass")
    add("--seed", type=whole_number, default=0, metavar="N", help="of sampling")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    add("--dtype", metavar="T", help="bf16, fp16, fp32; default: the checkpoint's")
    add("--compile", action="store_true", help="compile decoding first: pays for long answers")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--prune", metavar="P", help="drop image tokens: a method ('list' shows all) or FILE.py:CLASS")
    add("--keep", metavar="R", help="of each image: a fraction (1.0: all) or a whole number of tokens")
    add("--set", action="append", default=[], metavar="K=V", help="another option of the method")
    add("--save-map", type=Path, metavar="PATH", help="draw what was kept over the image")
    add("--map", choices=("kept", "attention"), default="kept",
        help="attention: draw what the prompt looks at")
    return parser.parse_args()


def command(args: argparse.Namespace):
    """Everything that can be wrong with the arguments is found before anything is printed."""
    if args.prune == "list":
        return write(catalogue())
    pruner = parse_pruner(args.prune, args.keep, args.set)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    sampler = Sampler(args.temperature, args.top_p, args.seed)
    chatting = not args.prompt and sys.stdin is not None and sys.stdin.isatty()
    if chatting and args.json:
        raise ValueError("--json needs a --prompt: a chat is for people")
    images = [open_image(path) for path in args.image]
    prompts = args.prompt or ([] if chatting else [piped_prompt(bool(images))])
    if args.save_map is not None:
        if len(prompts) != 1 or not images:
            raise ValueError("--save-map draws one answer about an image: give --image and one --prompt")
        check_output("--save-map", args.save_map, MAP_SUFFIXES)
        pruner = Recorder(pruner or Pruner(), attention=args.map == "attention")
    assistant = Assistant(args.model, args.device, args.dtype, args.revision, args.compile)
    encoded = assistant.encode_images(images, pruner)
    if args.compile:
        assistant.warm_up(max(1, len(prompts)), encoded)
        say(f"compiled in {assistant.ms['compile'] / 1000:.0f} s")
    ask = partial(assistant.answer, encoded=encoded, max_new_tokens=args.max_new_tokens, sampler=sampler,
                  date=args.date, pruner=pruner)
    if chatting:
        return chat_about(args, assistant, ask, encoded, pruner)
    conversations = [messages(prompt, len(images), args.system) for prompt in prompts]
    answer_all(args, assistant, ask, encoded, pruner, conversations)
    if args.save_map is not None:
        draw = attention_map if args.map == "attention" else kept_map
        with writing("--save-map", args.save_map) as file:
            draw(images, assistant.processor, pruner, str(pruner)).save(file)


def answer_all(args: argparse.Namespace, assistant: Assistant, ask: Callable[..., Answer],
               encoded: EncodedImages, pruner: Pruner | None, conversations: list[list[dict]]):
    """One answer is printed as it is made; those of a batch in order at the end, a line each."""
    live = len(conversations) == 1 and not args.json
    answer = stream(assistant, ask, conversations[0]) if live else ask(conversations)
    texts = [assistant.tokenizer.decode(tokens) for tokens in answer.tokens]
    named = None if args.prune is None else str(pruner)         # one that only draws a map has no name
    if args.json:
        return write_json(as_json(args.model, texts, answer, encoded, named))
    if not live:
        write("".join(text + "\n" for text in texts))
    say_model(args.model)
    say_cost(answer, encoded, named)


def chat_about(args: argparse.Namespace, assistant: Assistant, ask: Callable[..., Answer],
               encoded: EncodedImages, pruner: Pruner | None):
    """Every question is about the same images, which were encoded once."""
    def reply(conversation: list[dict]) -> str:
        answer = stream(assistant, ask, conversation)
        say_cost(answer, encoded, None if pruner is None else str(pruner))
        return assistant.tokenizer.decode(answer.tokens[0])

    say_model(args.model)
    chat(reply, args.system, len(args.image))


def stream(assistant: Assistant, ask: Callable[..., Answer], conversation: list[dict]) -> Answer:
    """Answer a conversation, and print the answer as it is made."""
    text = Detokenizer(assistant.tokenizer)
    answer = ask([conversation], emit=lambda row, token: write(text.push(token)))
    write(text.flush() + "\n")
    return answer


def main():
    program.run(command, arguments)


if __name__ == "__main__":
    main()
