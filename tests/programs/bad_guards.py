"""Rows of the table of bad input (bad_input.py) about --guard."""
from pathlib import Path

from bad_files import QUESTION, flags, model, piped, typed

PUBLISHED = Path(__file__).parents[1] / "weights" / "data" / "llama_guard_3_vision" / "chat_template.json"
TEMPLATE = "chat_template.json", PUBLISHED.read_bytes()
FIXED = "chat_template.json", TEMPLATE[1].replace(b"categories is not defined", b"true")


def guard(*args: str, template: tuple[str, bytes] = TEMPLATE):
    """A question to the bundled model with the template of Llama Guard."""
    return model(template, also=("--guard", *args, *QUESTION))


GUARDS = [
    ("no guard", flags("--guard"), "no categories of unsafe content", "Llama-Guard-3-11B-Vision"),
    ("no verdict", guard(), "neither safe nor unsafe"),
    ("no verdict, JSON", guard("--json"), "neither safe nor unsafe"),
    ("one token", guard("--max-new-tokens", "1"), "neither safe nor unsafe"),
    ("chat", typed("--guard"), "--guard needs a --prompt"),
    ("nothing to judge", lambda bench: ["--guard", *piped(b"", image=True)(bench)], "give --prompt TEXT"),
    ("empty prompt", model(TEMPLATE, also=("--guard", "--prompt", " ")), "prompt is empty"),
    ("empty answer", guard("--answer", " "), "the assistant's, is empty"),
    ("two answers", guard("--answer", "a", "--answer", "b"), "2 of --answer", "1 of --prompt"),
    ("answer not UTF-8", guard("--answer", "\udce9"), "text of the assistant message", "UTF-8"),
    ("answer of a chat", flags("--answer", "a"), "--answer is for a guard: add --guard"),
    ("category of a chat", flags("--category", "S1: a"), "--category is for a guard"),
    ("exclusion of a chat", flags("--exclude-category", "S1"), "--exclude-category is for a guard"),
    ("system message", guard("--system", "x"), "leave --system out"),
    ("category without text", guard("--category", "S1"), "--category 'S1'", "S1: Violent Crimes."),
    ("category with an empty text", guard("--category", "S1: "), "--category 'S1: '"),
    ("category without key", guard("--category", ": x"), "--category ': x'"),
    ("category twice", guard("--category", "S1: x", "--category", "S1: y"), "'S1: y'", "each key once"),
    ("category not UTF-8", guard("--category", "S1: \udce9"), "category 'S1'", "UTF-8"),
    ("unknown exclusion", guard("--exclude-category", "S14"), "'S14' is none of S1, S2"),
    ("unknown exclusion of own", guard("--category", "A: x", "--exclude-category", "B"), "'B' is none of A"),
    ("nothing left", guard("--category", "A: x", "--exclude-category", "A"), "all categories are excluded"),
    ("fixed categories", guard("--category", "A: x", template=FIXED), "fixed categories"),
]
