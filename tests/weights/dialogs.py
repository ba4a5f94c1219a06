"""Conversations for the tests of Meta's chat format, and a tokenizer.json of Llama 3's kind for them."""
import json
import random

from text_side import IMAGE_PART, text_part

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006,
           "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009, "<|image|>": 128256}
TEXTS = ["\nHi", "Hi", "Hi\n", "\n\nHi\n\n", "\n", "\n\n", "\n\n\n\nx", " ", "", "\t", " \n Hi \r\n",
         "\r\nthere", "  two  words  ", "user", "assistant", "What is in the picture?", " left of it",
         "or right?", "1 22 333 4444", "don't", "naïve café", "画像の中", "👍🏽", "e\u0301", "<|eot_id|>",
         "<|image|>", "<|start_header_id|>system", "<", "|>", "{\"answer\": 42}",
         "x = 1\n    y = 2\n", "Be brief.", "…"]


def dialogs(count: int, seed: int) -> list[list[dict]]:
    """Random conversations: all roles in any order, texts with all kinds of white space at their ends, texts
    side by side, images anywhere but in system messages, blank turns, last turns of all roles but system."""
    generator = random.Random(seed)
    made = []
    while len(made) < count:
        turns = [_message("system", generator)] if generator.random() < 0.3 else []
        for _ in range(generator.randint(1, 5)):
            turns.append(_message(generator.choice(["user"] * 4 + ["assistant"] * 3 + ["tool", "ipython"]),
                                  generator))
        if generator.random() < 0.05:
            turns.insert(generator.randrange(len(turns)), _message("system", generator))
        if turns[-1]["role"] in ("tool", "ipython") or not _is_blank(turns[-1]):
            made.append(turns)
    return made


def prompts(count: int, seed: int) -> list[list[dict]]:
    """Random prompts of base models: one message of a user, with text or an image."""
    generator = random.Random(seed)
    made = ([_message("user", generator)] for _ in range(10 * count))
    return [turns for turns in made if not _is_blank(turns[0])][:count]


def _message(role: str, generator: random.Random) -> dict:
    if generator.random() < 0.4:
        return {"role": role, "content": generator.choice(TEXTS)}
    images = 0.3 if role != "system" else 0
    return {"role": role, "content": [
        IMAGE_PART if generator.random() < images else text_part(generator.choice(TEXTS))
        for _ in range(generator.randint(0, 4))]}


def _is_blank(message: dict) -> bool:
    content = message["content"]
    if isinstance(content, str):
        return not content.strip()
    return all(part["type"] == "text" for part in content) and not "".join(
        part["text"] for part in content).strip()


def tokenizer_json(vocabulary: dict[str, int]) -> str:
    """The file of a tokenizer with these tokens. Their ids are also the order in which pairs are merged, as
    in Meta's tokenizer.model. Special tokens have the numbers of the hub."""
    merges = []
    for token in sorted(vocabulary, key=vocabulary.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": number, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for token, number in SPECIAL.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": {**vocabulary, **SPECIAL},
                  "merges": [list(pair) for pair in merges]}})
