"""Llama Guard: whether the last turn of a conversation is safe, and which categories it violates.

    conversation, Policy ── the guard's chat template ─► prompt ─► answer, "unsafe\\nS1,S9" ─► Verdict

The template writes the whole conversation into one task: the user's last message is judged, or the
assistant's if the conversation ends with it. `Assistant.judge` does all of it.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass

from weights.messages import one_line, quoted
from weights.policy import Policy
from weights.tokenizer import ChatTokenizer, messages

BLOCK = re.compile("<BEGIN UNSAFE CONTENT CATEGORIES>\n(.*?)<END UNSAFE CONTENT CATEGORIES>", re.DOTALL)
CATEGORY = re.compile(r"^(\w+): (.+)$", re.MULTILINE)
MOST_TOKENS = 100           # of a verdict: one that names all categories of the template takes 40


@dataclass(frozen=True)
class Verdict:
    """What a guard said: the violated categories, as {"S1": "Violent Crimes."}; None is the text of a key
    that it was not given."""
    safe: bool
    categories: dict[str, str | None]

    def __str__(self) -> str:
        """One line, as "unsafe: S1 Violent Crimes, S10 Hate"."""
        named = [key if text is None else f"{key} {one_line(text, 60).rstrip('.')}"
                 for key, text in self.categories.items()]
        return ("safe" if self.safe else "unsafe") + (": " + ", ".join(named) if named else "")


class Guard:
    """Reads verdicts. `policy` is for `encode`, `categories` are those that it judges by, with their texts.

    Raises ValueError with one line where the tokenizer's chat template is not a guard's, or where the policy
    does not fit it.
    """

    def __init__(self, tokenizer: ChatTokenizer, policy: Policy | None = None):
        self.tokenizer = tokenizer
        self.policy = Policy() if policy is None else policy
        written = self._written(self.policy)
        offered = self.policy.categories
        if offered is None:
            offered = dict(CATEGORY.findall(self._written(Policy())))
        for key in self.policy.excluded:
            if key not in offered:
                raise ValueError(f"the excluded category {quoted(key)} is none of "
                                 f"{one_line(', '.join(offered))}")
        self.categories = {key: text for key, text in offered.items() if key not in self.policy.excluded}
        if not self.categories:
            raise ValueError("all categories are excluded: leave at least one to judge by")
        self._check_written(written)

    def _written(self, policy: Policy) -> str:
        """What the template writes about categories."""
        block = BLOCK.search(self.tokenizer.decode(self.tokenizer.encode(messages("?"), policy=policy)))
        if block is None:
            raise ValueError("the chat template of this model has no categories of unsafe content: take a "
                             "guard, as meta-llama/Llama-Guard-3-11B-Vision")
        return block[1]

    def _check_written(self, written: str):
        """Some guards' templates know their own categories only."""
        lines = [line.partition(": ")[0] for line in written.splitlines()]
        if not all(f"{key}: {text}\n" in written for key, text in self.categories.items()) or any(
                key in lines for key in self.policy.excluded):
            raise ValueError("the chat template of this guard has fixed categories: give none, exclude none")

    def read(self, answers: Sequence[str]) -> list[Verdict]:
        """The verdicts in the texts of answers. Raises ValueError for an answer that is none."""
        return [self._verdict(text, f" {i}" if len(answers) > 1 else "") for i, text in enumerate(answers, 1)]

    def _verdict(self, text: str, number: str) -> Verdict:
        word, *more = [line.strip() for line in text.strip().splitlines()] or [""]
        if word == "safe" and not more:
            return Verdict(True, {})
        if word != "unsafe" or len(more) > 1:
            raise ValueError(f"the guard's answer{number} is neither safe nor unsafe: {quoted(text)}")
        keys = [key.strip() for key in ",".join(more).split(",")]
        return Verdict(False, {key: self.categories.get(key) for key in keys if key})
