"""The rows of the table of bad input for `generate.py --jsonl`: what ends it before anything is asked."""
from bad_files import bare, flags, in_folder, with_pipe, without_permission

QUESTION = b'{"id": 1, "prompt": "What is a star?"}\n'
ASKED = "--jsonl", "HERE/q.jsonl", "--out", "HERE/a.jsonl"


def file(*others: str, content: bytes = QUESTION):
    """This file of questions, and further arguments."""
    return in_folder(*ASKED, *others, name="q.jsonl", content=content)


JSONL = [
    ("with an image", file("--image", "IMAGE"), "--jsonl", "leave --image out"),
    ("with a prompt", flags("--jsonl", "q.jsonl", "--out", "a.jsonl"), "--jsonl", "leave --prompt out"),
    ("as JSON", file("--json"), "leave --json out"),
    ("for a guard", file("--guard"), "leave --guard out"),
    ("with a map", file("--save-map", "HERE/m.png"), "leave --save-map out"),
    ("without answers", bare("--jsonl", "q.jsonl"), "--jsonl needs a file", "--out"),
    ("answers without", flags("--out", "a.jsonl"), "--out", "name it with --jsonl"),
    ("batch without", flags("--batch", "2"), "--batch", "name it with --jsonl"),
    ("batch 0", file("--batch", "0"), "--batch is 0", "at least 1"),
    ("batch of millions", file("--batch", "1000000"), "--batch is 1000000", "at most 4096"),
    ("length 0", file("--max-new-tokens", "0"), "--max-new-tokens is 0"),
    ("unknown way", file("--too-long", "cut"), "--too-long", "refuse", "clamp"),
    ("unknown method", file("--prune", "fast"), "'fast'", "choose"),
    ("missing", bare("--jsonl", "none.jsonl", "--out", "a.jsonl"), "none.jsonl", "No such file"),
    ("a folder", in_folder("--jsonl", "HERE", "--out", "HERE/a.jsonl"), "a folder, not a file"),
    ("a pipe", with_pipe("q.jsonl", in_folder(*ASKED)), "q.jsonl", "a pipe"),
    ("answers over the questions", in_folder("--jsonl", "HERE/q.jsonl", "--out", "HERE/./q.jsonl",
                                             name="q.jsonl", content=QUESTION), "same file", "two names"),
    ("answers in no folder", in_folder("--jsonl", "HERE/q.jsonl", "--out", "HERE/none/a.jsonl",
                                       name="q.jsonl", content=QUESTION), "no folder", "create it"),
    ("answers over a text", in_folder("--jsonl", "HERE/good.png", "--out", "HERE/q.jsonl", name="q.jsonl",
                                      content=b"a star"), "line 1 is no answer of --jsonl", "another file"),
    ("answers over other JSON", in_folder("--jsonl", "HERE/good.png", "--out", "HERE/q.jsonl", name="q.jsonl",
                                          content=QUESTION), "line 1 is no answer", "another file"),
    ("answers without permission", without_permission(file()), "nothing can be written"),
    ("no model", file("--model", "HERE/none"), "neither 'tiny'"),
]
