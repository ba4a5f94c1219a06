"""Meta's tokenizer.model as a tokenizer.json: a line for each token, its bytes in base64 and its rank.

The rank is the token's id, and also the order in which pairs of tokens are merged. Special tokens follow the
ordinary ones. Meta counts `<|image|>` among them, at the twelfth place; the official layout has a reserved
token there and `<|image|>` after all others: the first of the extra embeddings.
"""
import base64
import binascii
import json
from pathlib import Path

from weights.files import again, read_bytes
from weights.messages import named, quoted
from weights.vocabulary import LLAMA3_SPLIT

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
           "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
COUNT_SPECIAL = 256
IMAGE = "<|image|>"


def read_ranks(path: Path, vocab_size: int) -> dict[bytes, int]:
    """Every ordinary token and its rank, from 0 on. Raises ValueError with one line."""
    ranks = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{named(path)}: line {number} is {quoted(line, 60)}, not a token in base64 and "
                             f"its rank; {again(path)}") from None
    if sorted(ranks.values()) != list(range(vocab_size - COUNT_SPECIAL)) or b"" in ranks:
        raise ValueError(f"{named(path)}: {len(ranks)} tokens, where {vocab_size - COUNT_SPECIAL} with the "
                         "ranks from 0 on are needed; it belongs to another model, or is incomplete")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{named(path)}: no token for the byte {missing[0]}; {again(path)}")
    return ranks


def special_tokens(ordinary: int) -> dict[str, int]:
    """The special tokens and their ids in the official layout."""
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(2, COUNT_SPECIAL)]
    names = [*SPECIAL, *reserved][:COUNT_SPECIAL]
    return {name: ordinary + place for place, name in enumerate([*names, IMAGE])}


def tokenizer_json(ranks: dict[bytes, int]) -> str:
    """The content of tokenizer.json: byte-level BPE with Llama 3's way of splitting text."""
    letters = byte_letters()
    special = special_tokens(len(ranks))
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": number, "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for name, number in special.items()],
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None, "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": vocabulary, "merges": merges(vocabulary)},
    }, ensure_ascii=False)


def merges(vocabulary: dict[str, int]) -> list[list[str]]:
    """Every pair of tokens that together are a token, in the order of the ranks of what they make."""
    pairs = []
    for token in sorted(vocabulary, key=vocabulary.get):
        splits = [[token[:i], token[i:]] for i in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs += sorted(splits, key=lambda pair: [vocabulary[part] for part in pair])
    return pairs


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself if it can be seen, else one from 256 on."""
    letters, unseen = [], 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            letters.append(chr(byte))
        else:
            letters.append(chr(unseen))
            unseen += 1
    return letters
