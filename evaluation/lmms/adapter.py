"""`lmms-eval --model trimmed_llama`: this model, with any pruner, as a model of lmms-eval.

    lmms-eval ─ requests ─► Question ─► questions.answer ─► texts ─► lmms-eval,   and a record of kept tokens

    --model_args model=MODEL,prune=trimmed_llama,keep=0.25,record=kept.jsonl

A list stands in brackets: `set=[full_layers=0,when=boundary]`, `device=[cuda:0,cuda:1]`. This is a program of
lmms-eval's: its errors end in lmms-eval's tracebacks, the last line of which says what is wrong.
"""
import os
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from cli.options import parse_pruner
from evaluation.lmms.questions import Answered, Limits, Question, answer
from evaluation.lmms.record import Record
from generate import Assistant
from pruning import Pruner
from weights.image_file import open_image
from weights.messages import quoted

MAX_NEW_TOKENS = 1024       # where a task does not say: as lmms-eval's own llama_vision


class TrimmedLlama(lmms):
    """Answers one turn of text and images. Images come before the text; there is no system message."""

    def __init__(self, model: str = "tiny", prune: str | None = None, keep: float | int | None = None,
                 set: str | None = None, record: str | None = None, device: str | None = None,
                 dtype: str | None = None, quantize: str | None = None, revision: str | int | None = None,
                 adapter: str | None = None, offload: bool = False, compile: bool = False,
                 obey_until: bool = False, batch_size: int | str = 1, max_batch_size: int | None = None):
        """`batch_size`, `max_batch_size` and `device` are options of lmms-eval as well. `obey_until` ends
        answers at the stop texts of the task; lmms-eval gives an empty line to tasks that name none."""
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("the model answers in one process: start a run of its own on each GPU, with "
                             "device=cuda:0 and so on, or give one run several: device=[cuda:0,cuda:1]")
        self.batch = parse_batch(batch_size)
        self.pruner = parse_pruner(prune, None if keep is None else str(keep), listed(set)) or Pruner()
        self.obey_until = obey_until
        revision = None if revision is None else str(revision)
        settings = {"model": model, "revision": revision, "dtype": dtype, "quantize": quantize,
                    "adapters": listed(adapter),
                    "prune": [self.pruner.name, self.pruner.keep, self.pruner.options_set()]}
        self.record = None if record is None else Record(Path(record), settings)
        self.assistant = Assistant(model, ",".join(listed(device)) or None, dtype, revision, compile,
                                   listed(adapter), offload, quantize)

    def generate_until(self, requests: list[Instance]) -> Iterator[GenerationResult]:
        """The answers, in the order of the requests. A generator, because `--use_cache` writes each answer as
        it comes, and so keeps those of a run that is killed. It asks for no more than it needs: nothing may
        come after the last `yield`."""
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            for batch in self.batches(requests):
                answered = answer(self.assistant, [self.question(*request.args) for request in batch],
                                  self.pruner)
                if self.record is not None:
                    self.record.add([line_of(request, made)
                                     for request, made in zip(batch, answered, strict=True)])
                bar.update(len(batch))
                for made in answered:
                    yield GenerationResult(made.text, TokenCounts(made.prompt_tokens, made.new_tokens))

    def batches(self, requests: list[Instance]) -> Iterator[list[Instance]]:
        """Requests of one task that follow each other."""
        for _, group in groupby(requests, lambda request: request.args[4]):
            group = list(group)
            for first in range(0, len(group), self.batch):
                yield group[first:first + self.batch]

    def question(self, text: str, options: dict, doc_to_visual: Callable, doc_id: int, task: str,
                 split: str) -> Question:
        """One request of lmms-eval's: `options` are its `generation_kwargs`."""
        where = f"{task}, document {doc_id}"
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise ValueError(f"{where}: {type(visual).__name__} is no image, and nothing else is read: "
                                 "choose tasks about images")
        return Question(text, [open_image(visual) for visual in visuals], self.limits(options, where))

    def limits(self, options: dict, where: str) -> Limits:
        if int(options.get("num_beams") or 1) > 1:
            raise ValueError(f"{where}: num_beams is {options['num_beams']}, but there is no beam search: "
                             "give --gen_kwargs num_beams=1")
        until = options.get("until") or []
        stop = [word for word in ([until] if isinstance(until, str) else until) if word]
        temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
        return Limits(int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
                      tuple(stop) if self.obey_until else (), temperature, float(options.get("top_p") or 1.0))

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("trimmed_llama answers in words: choose tasks of the kind generate_until")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("trimmed_llama answers one turn: choose tasks of the kind generate_until")


def line_of(request: Instance, made: Answered) -> dict:
    """What the record holds of one answer; counts of tokens, and milliseconds."""
    return {"task": request.args[4], "doc_id": request.args[3], "real": made.real, "kept": made.kept,
            "early": made.early, "prompt_tokens": made.prompt_tokens, "new_tokens": made.new_tokens,
            "ms": round(made.ms, 3)}


def listed(text: str | None) -> list[str]:
    """The parts of "[a,b]" or "a"; None has none."""
    return [] if text is None else [part.strip() for part in str(text).strip("[]").split(",")]


def parse_batch(text: int | str) -> int:
    """A batch size, which lmms-eval gives as text. Raises ValueError for what is none, as "auto"."""
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"--batch_size is {quoted(text)}, but must be a whole number, at least 1")
    return size
