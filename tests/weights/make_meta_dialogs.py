"""Writes data/meta_dialogs.json: conversations, and their token ids as Meta's own code makes them.

    pip install llama-models tiktoken && PYTHONPATH=.:tests/weights python tests/weights/make_meta_dialogs.py

`llama-models` 0.3.0 has Meta's tokenizer.model and ChatFormat. 2,000 conversations are compared with ours on
the whole vocabulary first, and then 200 prompts of base models; 90 and 20 are stored, with as much of the
vocabulary as their texts need. Ids are those of the hub, where `<|image|>` is 128256, as Meta's code returns.
"""
import io
import json
import tempfile
from pathlib import Path

from dialogs import SPECIAL, SPLIT, dialogs, prompts, tokenizer_json
from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from PIL import Image
from tokenizers import Regex, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.config import Config
from weights.tokenizer import ChatTokenizer

OUT = Path(__file__).parent / "data" / "meta_dialogs.json"
COMPARED, STORED = 2000, 90
COMPARED_PROMPTS, STORED_PROMPTS = 200, 20
STOPS = [SPECIAL[token] for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
LETTERS = bytes_to_unicode()


def main():
    theirs = ChatFormat(MetaTokenizer.get_instance())
    vocabulary = {letters(token): rank for token, rank in theirs.tokenizer.model._mergeable_ranks.items()}
    content = tokenizer_json(vocabulary)
    ours, base = chat_tokenizer(content, STOPS), chat_tokenizer(content, STOPS[:1])
    wrong = [turns for turns in dialogs(COMPARED, seed=0) if ours.encode(turns) != dialog_ids(theirs, turns)]
    print(f"{len(wrong)} of {COMPARED} conversations differ")
    wrong = [turns for turns in prompts(COMPARED_PROMPTS, seed=0)
             if base.encode(turns) != prompt_ids(theirs, turns)]
    print(f"{len(wrong)} of {COMPARED_PROMPTS} prompts of base models differ")
    chats, bare = dialogs(STORED, seed=1), prompts(STORED_PROMPTS, seed=1)
    used = set(LETTERS.values())
    for text in {"user", "system", "assistant", "ipython", "\n\n", *texts_of(chats + bare)}:
        used |= tokens_on_the_way(text, vocabulary)
    parts = {"vocabulary": as_json({token: vocabulary[token] for token in sorted(used, key=vocabulary.get)}),
             "dialogs": table([(turns, dialog_ids(theirs, turns)) for turns in chats]),
             "prompts": table([(turns, prompt_ids(theirs, turns)) for turns in bare])}
    OUT.write_text("{" + ",\n".join(f'"{name}":{text}' for name, text in parts.items()) + "}\n")
    print(f"stored {STORED} conversations, {STORED_PROMPTS} prompts, {len(used)} tokens")


def as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def table(rows: list[tuple[list[dict], list[int]]]) -> str:
    return "[\n" + ",\n".join(map(as_json, rows)) + "]"


def letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def dialog_ids(theirs: ChatFormat, turns: list[dict]) -> list[int]:
    return theirs.encode_dialog_prompt([raw_message(turn) for turn in turns]).tokens


def prompt_ids(theirs: ChatFormat, turns: list[dict]) -> list[int]:
    """Of the only message, as for a base model."""
    return theirs.encode_content(raw_message(turns[0]).content).tokens


def raw_message(turn: dict) -> RawMessage:
    content = turn["content"]
    if not isinstance(content, str):
        content = [RawTextItem(text=part["text"]) if part["type"] == "text" else RawMediaItem(data=pixel())
                   for part in content]
    return RawMessage(role="tool" if turn["role"] == "ipython" else turn["role"], content=content)


def pixel() -> io.BytesIO:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "png")
    return file


def chat_tokenizer(content: str, stops: list[int]) -> ChatTokenizer:
    """Ours, of a checkpoint without a chat template that ends its text with these tokens."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(content, encoding="utf-8")
        (Path(folder) / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        return ChatTokenizer.from_folder(folder, Config())


def texts_of(conversations: list[list[dict]]) -> set[str]:
    contents = [turn["content"] for turns in conversations for turn in turns]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return {text for text in contents if isinstance(text, str)} | {part["text"] for part in parts
                                                                    if part["type"] == "text"}


def tokens_on_the_way(text: str, ranks: dict[str, int]) -> set[str]:
    """Every token that is there at some time while the pairs of a text are merged."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    seen = set()
    for word, _ in split.pre_tokenize_str(text):
        parts = list(word)
        seen |= {word} & ranks.keys()
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                     if a + b in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
            seen.add(parts[i])
    return seen


if __name__ == "__main__":
    main()
