"""`generate.py --guard`: its options, and how verdicts are printed. What a guard is: weights/guard.py."""
import argparse

from cli.answers import Ask, as_json, say_cost, say_model, write_json
from cli.arguments import Parser
from cli.program import write
from model.answer import EncodedImages
from pruning import Pruner
from weights.guard import Guard
from weights.messages import quoted
from weights.policy import Policy


def add_guard_options(parser: Parser):
    parser.section("a guard")
    parser.add_argument("--guard", action="store_true",
                        help="judge with Llama Guard: safe, or unsafe and in what")
    parser.add_rare("--answer", action="append", default=[], metavar="TEXT",
                    help="judge this answer to the prompt; one for each --prompt")
    parser.add_rare("--category", action="append", default=[], metavar="K:TEXT",
                    help="judge by this instead, as 'S1: Violent Crimes.'; several are given one by one")
    parser.add_rare("--exclude-category", action="append", default=[], metavar="K",
                    help="do not judge by this category of the guard's own")


def parse_policy(args: argparse.Namespace, prompts: int) -> Policy | None:
    """What the options of a guard say, None without --guard. Raises ValueError with one line."""
    given = {"--answer": args.answer, "--category": args.category,
             "--exclude-category": args.exclude_category}
    if not args.guard:
        for option, values in given.items():
            if values:
                raise ValueError(f"{option} is for a guard: add --guard")
        return None
    if args.system is not None:
        raise ValueError("--guard judges messages of users and assistants: leave --system out")
    if args.answer and len(args.answer) != prompts:
        raise ValueError(f"there are {len(args.answer)} of --answer and {prompts} of --prompt: give one for "
                         "each prompt")
    categories = {}
    for text in args.category:
        key, _, about = (part.strip() for part in text.partition(":"))
        if not key or not about or key in categories:
            raise ValueError(f"--category {quoted(text)}: write it as 'S1: Violent Crimes.', each key once")
        categories[key] = about
    return Policy(categories or None, args.exclude_category)


def with_answers(conversations: list[list[dict]], answers: list[str]) -> list[list[dict]]:
    """The conversations, each with an answer of the assistant's at its end if there are any."""
    if not answers:
        return conversations
    return [[*turns, {"role": "assistant", "content": answer}]
            for turns, answer in zip(conversations, answers, strict=True)]


def print_verdicts(args: argparse.Namespace, guard: Guard, ask: Ask, encoded: EncodedImages,
                   pruner: Pruner | None, conversations: list[list[dict]]):
    """A line for each conversation, in their order, or one JSON object."""
    answer = ask(with_answers(conversations, args.answer))
    verdicts = guard.read(answer.texts)
    named = None if args.prune is None else str(pruner)         # one that only draws a map has no name
    if args.json:
        safe = [verdict.safe for verdict in verdicts]
        categories = [verdict.categories for verdict in verdicts]
        if len(verdicts) == 1:
            safe, categories = safe[0], categories[0]
        cost = as_json(args.model, answer, encoded, named)
        return write_json({**cost, "safe": safe, "categories": categories})
    write("".join(f"{verdict}\n" for verdict in verdicts))
    say_model(args.model)
    say_cost(answer, encoded, named)
