"""What a conversation is, and Meta's own formats for checkpoints that bring no chat template.

    messages ── check_messages ─► turns ── dialog_pieces or bare_pieces ─► pieces ─► tokenizer.py

Pieces are token ids of special tokens, and texts, each of which is tokenised by itself. So nobody can type a
special token, and a message that begins with a line break does not merge with the line breaks of its header.
Source: `encode_dialog_prompt` and `encode_content` in `chat_format.py` of Meta's `llama-models`. Meta's code
also cuts texts of over 400,000 characters, and runs of over 25,000 letters or of white space; here they stay
whole.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from weights.messages import quoted

BEGIN, IMAGE, EOT = "<|begin_of_text|>", "<|image|>", "<|eot_id|>"
HEADERS = "<|start_header_id|>", "<|end_header_id|>"
TOOLS = ("tool", "ipython")         # two names of one role
ROLES = ("system", "user", "assistant", *TOOLS)
MOST_TEXT = 2_000_000               # characters of a conversation: more than any context holds


@dataclass
class Turn:
    """A checked message: its texts in order, None for an image, and whether a template gets one string."""
    role: str
    parts: list[str | None]
    as_string: bool


# ---- Meta's formats

def dialog_pieces(turns: list[Turn], special: dict[str, int]) -> list[int | str]:
    """The format of instruct models. `special` has the ids of the special tokens.

    No text is added that nobody wrote, no date, and nothing is trimmed. The last turn is closed like all
    others, also where it is the assistant's: the answer is a turn of its own.
    """
    pieces = []
    for turn in turns:
        pieces += _header(turn.role, special)
        pieces += _parts(turn, special)
        pieces.append(special[EOT])
    return pieces + _header("assistant", special)


def bare_pieces(turns: list[Turn], special: dict[str, int]) -> list[int | str]:
    """The format of base models, which know no roles: images and texts as they come, to be continued."""
    for turn in turns:
        if turn.role not in ("user", "assistant"):
            raise ValueError(f"a base model knows no {turn.role} message: put its text into the prompt")
    return [piece for turn in turns for piece in _parts(turn, special)]


def _header(role: str, special: dict[str, int]) -> list[int | str]:
    start, end = HEADERS
    return [special[start], "ipython" if role in TOOLS else role, special[end], "\n\n"]


def _parts(turn: Turn, special: dict[str, int]) -> list[int | str]:
    return [special[IMAGE] if text is None else text for text in turn.parts]


# ---- messages

def check_messages(messages: Sequence[dict]) -> list[Turn]:
    """The checked messages of a conversation (see ChatTokenizer.encode). Raises ValueError with one line."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"a conversation must be a list of messages, not {quoted(messages)}")
    turns = [_turn(message) for message in messages]
    if not turns or turns[-1].role == "system":
        raise ValueError("a conversation must end with a message to answer, a user's for example")
    last = turns[-1]
    if last.role not in TOOLS and None not in last.parts and not "".join(last.parts).strip():
        what = "prompt" if last.role == "user" else "last message, the assistant's,"
        raise ValueError(f"the {what} is empty: give it text, an image or both")
    length = sum(len(text) for turn in turns for text in turn.parts if text is not None)
    if length > MOST_TEXT:
        raise ValueError(f"the conversation has {length:,} characters, more than any context holds: "
                         "shorten it")
    return turns


def _turn(message: dict) -> Turn:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or role not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, not {quoted(role)}")
    if message.get("tool_calls"):
        raise ValueError("a message has tool_calls, which are not supported: write the call into its content")
    content = message.get("content")
    in_parts = isinstance(content, (list, tuple))
    parts = [_part(part, role) for part in (content if in_parts else [{"type": "text", "text": content}])]
    if role == "system" and None in parts:
        raise ValueError("a system message cannot hold an image: put it into a user's message")
    return Turn(role, parts, as_string=role == "system" or not in_parts)


def _part(part: dict, role: str) -> str | None:
    """The text of a part, None for an image. What else is in it is left out."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return valid_text(f"text of the {role} message", part.get("text"))
    if kind != "image":
        raise ValueError(f'each part of a {role} message must be {{"type": "image"}} or {{"type": "text", '
                         f'"text": ...}}, not {quoted(part)}; images are given beside the messages')
    return None


def valid_text(name: str, text: object) -> str:
    """A plain str of valid Unicode. `name` says in the error what it should have been."""
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, not {type(text).__name__}")
    try:
        return text.encode().decode()
    except UnicodeEncodeError:
        raise ValueError(f"the {name} is not valid Unicode: it holds bytes that are not UTF-8") from None
