"""System text beside an image, for chat templates that refuse it: it moves into the first user's turn.

One of the official templates of Llama-3.2-Vision raises "Prompting with images is incompatible with system
messages." Others, the newest among them, write both.
"""
from collections.abc import Sequence

from weights.chat_format import check_messages
from weights.chat_template import ChatTemplate

FOLDED = ("the chat template refuses a system message beside an image: it stands at the head of the first "
          "question instead")


def fold_system(template: ChatTemplate | None, messages: Sequence[dict],
                date: str | None = None) -> Sequence[dict]:
    """The conversation with its system text at the head of the first user's text, where the template refuses
    it because of an image only; else the conversation itself, whether it can be written or not."""
    try:
        turns = check_messages(messages)
    except ValueError:
        return messages                     # whoever encodes it will hear why
    if template is None or turns[0].role != "system" or all(None not in turn.parts for turn in turns):
        return messages
    if can_write(template, messages, date) or not can_write(template, without_images(messages), date):
        return messages
    folded = folded_system(messages)
    return folded if can_write(template, folded, date) else messages


def can_write(template: ChatTemplate, messages: Sequence[dict], date: str | None) -> bool:
    try:
        template.render(check_messages(messages), date)
    except ValueError:
        return False
    return True


def without_images(messages: Sequence[dict]) -> list[dict]:
    """The same conversation about no image; a turn of images alone becomes a question."""
    question = [{"type": "text", "text": "?"}]
    return [{**message, "content": [part for part in parts(message) if part["type"] == "text"] or question}
            for message in messages]


def folded_system(messages: Sequence[dict]) -> list[dict]:
    """The system text, an empty line, and then the text of the first user's turn; its images come first."""
    [system, *others] = messages
    if others[0]["role"] != "user":
        return [*messages]
    words = "".join(part["text"] for part in parts(system))
    first = parts(others[0])
    at = next((i for i, part in enumerate(first) if part["type"] == "text"), len(first))
    if at < len(first):
        words += "\n\n" + first[at]["text"]
    turn = {"role": "user", "content": [*first[:at], {"type": "text", "text": words}, *first[at + 1:]]}
    return [turn, *others[1:]]


def parts(message: dict) -> list[dict]:
    """The content of a message as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else [*content]
