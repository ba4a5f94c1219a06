"""The command line of generate.py: its options, and what is done about them."""
import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cli.answers import print_answers
from cli.chat import Chat
from cli.jsonl import add_jsonl_options, ask_file, check_jsonl
from cli.judge import add_guard_options, parse_policy, print_verdicts
from cli.options import (
    Parser,
    add_model_options,
    add_sampling,
    catalogue,
    check_map,
    model_options,
    parse_pruner,
    parse_sampler,
    piped_prompt,
    read_images,
    say_how,
    whole_number,
    writing,
)
from cli.program import say, write
from pruning import Pruner
from pruning.recorder import Recorder
from pruning.visualize import attention_map, kept_map
from weights.guard import Guard
from weights.ranks import join
from weights.stop_texts import check_stops
from weights.tokenizer import messages

EXAMPLES = ('python generate.py --image examples/tall.png --prompt "Where is the star?"',
            "python generate.py --image examples/shapes.png --prune fastv --keep 0.25")


def arguments() -> argparse.Namespace:
    parser = Parser("python generate.py", "Ask Llama-3.2-Vision about images. Without --prompt: a chat.",
                    "[--image PATH]... [--prompt TEXT]... [options]", EXAMPLES)
    add, rare = parser.add_argument, parser.add_rare
    add_model_options(parser)
    parser.section("what is asked")
    add("--image", action="append", default=[], metavar="PATH",
        help="an image: path, URL or - (stdin); several go in one prompt")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a question; several make a batch")
    add("--system", metavar="TEXT", help="a system message")
    rare("--date", metavar="TEXT", help="today's date, for chat templates that write it")
    parser.section("the answer")
    add("--max-new-tokens", type=whole_number, default=256, metavar="N", help="default 256")
    add_sampling(parser)
    rare("--stop", action="append", default=[], metavar="TEXT",
         help="end the answer before this text appears; several may be given")
    add("--compile", action="store_true", help="compile decoding first: pays for long answers")
    add("--json", action="store_true", help="one JSON object on stdout")
    add_guard_options(parser)
    add_jsonl_options(parser)
    parser.section("fewer image tokens")
    add("--prune", metavar="P", help="drop image tokens: a method, FILE.py:CLASS, or 'list'")
    add("--keep", metavar="R", help="of each image: a fraction (1.0: all), or so many tokens")
    rare("--set", action="append", default=[], metavar="K=V", help="another option of the method")
    add("--save-map", type=Path, metavar="PATH", help="draw over the image what was kept or merged")
    rare("--map", choices=("kept", "attention"), default="kept",
         help="what --save-map draws; attention: what the prompt looks at")
    return parser.parse_args()


def ask(make: Callable, args: argparse.Namespace):
    """Do what the arguments say, with the Assistant that `make` makes.

    Everything that can be wrong with the arguments is found before anything is printed.
    """
    if args.prune == "list":
        return write(catalogue())
    pruner = parse_pruner(args.prune, args.keep, args.set)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    parse_sampler(args)
    check_stops(args.stop)
    check_jsonl(args)
    ranks = join(args.device)
    if args.jsonl is not None:
        return ask_file(make, args, pruner, ranks)
    chatting = ranks.first(lambda: not args.prompt and sys.stdin is not None and sys.stdin.isatty())
    if chatting and (args.json or args.guard):
        raise ValueError(f"{'--json' if args.json else '--guard'} needs a --prompt: a chat is for people")
    images = ranks.first(partial(read_images, args.image))
    about = bool(images) and not args.guard
    prompts = args.prompt or ([] if chatting else [ranks.first(partial(piped_prompt, about))])
    policy = parse_policy(args, len(prompts))
    if args.save_map is not None:
        check_map(args.save_map, args.image, len(prompts))
        pruner = Recorder(pruner or Pruner(), attention=args.map == "attention")
    assistant = make(args.model, compile=args.compile, ranks=ranks, **model_options(args))
    sampler = parse_sampler(args, assistant.folder)
    say_how(assistant.model, args, assistant.adapters)
    guard = None if policy is None else Guard(assistant.tokenizer, policy)
    encoded = assistant.encode_images(images, pruner)
    if args.compile:
        assistant.warm_up(max(1, len(prompts)), encoded)
        say(f"compiled in {assistant.ms['compile'] / 1000:.0f} s")
    answer = partial(assistant.answer, max_new_tokens=args.max_new_tokens, sampler=sampler, date=args.date,
                     policy=policy, stop=args.stop, too_long=args.too_long)
    if chatting:
        return Chat(args, assistant.tokenizer, answer, assistant.encode_images, images, encoded, pruner,
                    ranks).run()
    answer = partial(answer, encoded=encoded, pruner=pruner)
    conversations = [messages(prompt, len(images), args.system) for prompt in prompts]
    if guard is not None:
        print_verdicts(args, guard, answer, encoded, pruner, conversations)
    else:
        print_answers(args, assistant.tokenizer, answer, encoded, pruner, conversations)
    if args.save_map is not None and ranks.rank == 0:
        draw = attention_map if args.map == "attention" else kept_map
        with writing("--save-map", args.save_map) as file:
            draw(images, assistant.processor, pruner, str(pruner)).save(file)
