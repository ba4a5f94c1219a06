"""`generate.py --jsonl QUESTIONS --out ANSWERS`: its options, and how the questions are asked.

    question_file.py ── batches of questions and their images ─► Assistant ─► lines of the file of answers

It may be stopped at any time: the same command goes on where it was. What cannot be asked gets a line with an
error, and at the end the exit code is 1.
"""
import argparse
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from cli.answers import mean
from cli.arguments import Parser
from cli.options import check_output, model_options, parse_sampler, say_how, whole_number
from cli.question_file import AnswerFile, Question, QuestionFile
from cli.terminal import Progress, say_wrapped
from pruning import Pruner
from weights.adapter_file import ADAPTER, NONE, find_adapters
from weights.adapters import find_base
from weights.files import open_regular, read_bytes
from weights.fingerprint import fingerprint
from weights.messages import named, one_line
from weights.ranks import Ranks, leave
from weights.system_text import fold_system
from weights.tokenizer import messages

BATCH = 8
MOST_BATCH = 4096


def add_jsonl_options(parser: Parser):
    parser.section("a file of questions")
    parser.add_rare("--jsonl", metavar="FILE",
                    help="ask its questions, or those of - (stdin): a line each, a JSON object with id, "
                    "prompt, and if there are any image (a path or a list), system, max_new_tokens")
    parser.add_rare("--out", type=Path, metavar="FILE",
                    help="the answers, a line each; the same command goes on where it was stopped")
    parser.add_rare("--batch", type=whole_number, metavar="N",
                    help=f"so many questions at once; default {BATCH}")
    parser.add_rare("--too-long", choices=("refuse", "clamp"), default="refuse",
                    help="where prompt and answer do not fit in the context; clamp: a shorter answer")


def check_jsonl(args: argparse.Namespace):
    """Raise ValueError with one line for options that do not go together."""
    if args.jsonl is None:
        for option, value in ("--out", args.out), ("--batch", args.batch):
            if value is not None:
                raise ValueError(f"{option} is for a file of questions: name it with --jsonl")
        return
    others = {"--image": args.image, "--prompt": args.prompt, "--json": args.json, "--guard": args.guard,
              "--answer": args.answer, "--save-map": args.save_map}
    for option, value in others.items():
        if value:
            raise ValueError(f"--jsonl asks what its lines say: leave {option} out")
    if args.out is None:
        raise ValueError("--jsonl needs a file for the answers: name it with --out")
    if args.batch is not None and not 1 <= args.batch <= MOST_BATCH:
        raise ValueError(f"--batch is {args.batch}, but must be at least 1, at most {MOST_BATCH}")
    check_output("--out", args.out)
    if args.jsonl != "-" and Path(args.jsonl).resolve() == args.out.resolve():
        raise ValueError("--jsonl and --out name the same file: give them two names")


def ask_file(make: Callable, args: argparse.Namespace, pruner: Pruner | None, ranks: Ranks):
    """Ask everything that has no answer yet, with the Assistant that `make` makes. Ends with exit code 1 if
    there are lines that could not be asked."""
    answers = None
    if ranks.rank == 0:
        if args.jsonl != "-":
            open_regular(Path(args.jsonl)).close()          # is it there? before a file of answers is made
        answers = AnswerFile(args.out)
    with answers or nullcontext():
        questions = None
        if answers is not None:
            questions = QuestionFile(args.jsonl, answers, settings_of(args, pruner), args.system,
                                     args.max_new_tokens)
        known = len(answers.known) if answers else 0
        ask_batches(make, args, pruner, ranks, questions)
        made, errors = ranks.first(lambda: (answers.answered, answers.errors))
    say_wrapped(f"{made} answers written to {named(args.out)}, which had {known}"
                f"{f'; {errors} lines have an error in their place' if errors else ''}")
    if errors:
        leave()
        raise SystemExit(1)


def ask_batches(make: Callable, args: argparse.Namespace, pruner: Pruner | None, ranks: Ranks,
                questions: QuestionFile | None):
    """`questions` are those of rank 0, which reads and writes for all."""
    batches = questions.batches(args.batch or BATCH) if questions else None
    proven = ranks.first(lambda: bool(questions.answers.known))         # whether these settings have answered
    batch = ranks.first(lambda: next(batches, None))                    # before the model is loaded
    if batch is None:
        return
    assistant = make(args.model, compile=args.compile, ranks=ranks, **model_options(args))
    say_how(assistant.model, args, assistant.adapters)
    with Progress("questions") as report:
        while batch is not None:
            lines = answer_each(assistant, args, pruner, batch, proven)
            proven = True
            if questions:
                questions.answers.add(lines)
                if questions.total:
                    report(questions.done, questions.total)
            batch = ranks.first(lambda: next(batches, None))


def answer_each(assistant, args: argparse.Namespace, pruner: Pruner | None, batch: list[Question],
                proven: bool) -> list[dict]:
    """The lines of a batch. Where it fails as a batch, each question is asked alone, so that one does not
    cost the others their answers; but what fails before any answer is a fault of the settings."""
    lines = []
    good = []
    for question in batch:
        try:
            conversation = conversation_of(assistant, args, question)
            prompt = assistant.tokenizer.encode(conversation, args.date)
            limit = question.max_new_tokens if args.too_long == "refuse" else 1
            assistant.model.check_prompts([prompt], limit)
            good.append(question)
        except ValueError as error:
            lines.append(error_line(question, error))
    if not good:
        return lines
    try:
        return lines + answer_batch(assistant, args, pruner, good)
    except ValueError:
        if not proven:
            raise
    for question in good:
        try:
            lines += answer_batch(assistant, args, pruner, [question])
        except ValueError as error:
            lines.append(error_line(question, error))
    return lines


def conversation_of(assistant, args: argparse.Namespace, question: Question) -> list[dict]:
    turns = messages(question.prompt, len(question.images), question.system)
    return fold_system(assistant.tokenizer.template, turns, args.date)


def error_line(question: Question, error: ValueError) -> dict:
    return {"id": question.ident, "error": one_line(error)}


def answer_batch(assistant, args: argparse.Namespace, pruner: Pruner | None,
                 batch: list[Question]) -> list[dict]:
    """A line for each question; milliseconds are an equal share of those of the batch."""
    encoded = assistant.encode_images([question.images for question in batch], pruner)
    sampler = parse_sampler(args, assistant.folder)         # seeded anew, so that no batch changes another
    answer = assistant.answer([conversation_of(assistant, args, question) for question in batch], encoded,
                              [question.max_new_tokens for question in batch], sampler, args.date,
                              pruner=pruner, stop=args.stop, too_long=args.too_long)
    ms = sum(answer.ms[part] for part in ("encode", "prefill", "decode")) / len(batch)
    return [{"id": question.ident, "text": answer.texts[b], "prompt_tokens": answer.prompt_tokens[b],
             "new_tokens": len(answer.tokens[b]), "image_tokens": answer.real[b],
             "kept": round(mean(answer.kept[b]), 2), "ms": round(ms, 2), "key": question.key}
            for b, question in enumerate(batch)]


def settings_of(args: argparse.Namespace, pruner: Pruner | None) -> list:
    """All that answers depend on, beside the question. Not the device or the batch: there an answer is the
    same but for rounding, and the work may go on elsewhere."""
    folders = find_adapters(args.adapter)
    weights = [fingerprint(find_base(args.model, args.revision, folders)),
               *(fingerprint(folder, ADAPTER) for folder in folders if folder != NONE)]
    method = None
    if pruner is not None:
        file, colon, _ = args.prune.rpartition(":")
        code = zlib.crc32(read_bytes(file)) if colon else None
        method = [pruner.name, pruner.keep, pruner.options_set(), code]
    return [weights, args.dtype, args.quantize, args.date, args.stop, args.too_long, args.temperature,
            args.top_p, args.top_k, args.repetition_penalty, args.sample, args.seed, method]
