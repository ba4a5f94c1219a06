"""Ways to damage a file: by its bytes, by its words, or by the values of its JSON.

    mutated(rng, name, data, other) ─► bytes

What a file is, its name's suffix says. Everything that is chosen is chosen by `rng`, so a seed repeats it.
"""
import copy
import json
import math
import re
import zlib
from collections.abc import Callable
from random import Random

MOST = 300_000                      # bytes that a mutation adds
JSON_SUFFIXES = ".json", ".part"    # of .part, every line is JSON
BAD_TEXT = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\0", b"\r\n",
            b"\x1b[2J", b"\xe2\x80\xa8", b"{{", b"{%", b"<|image|>", b'"', b"\\ud800", b"\\u0000")
NUMBERS = (b"0", b"-1", b"1", b"1e999", b"-1e999", b"NaN", b"-Infinity", b"0.5", b"1e-320", b"2147483648",
           b"-2147483649", b"9223372036854775808", b"18446744073709551616", b"9" * 401, b"-" + b"9" * 5000)
# Values that json.dumps cannot write; they are put into the text afterwards.
WRITTEN = {"@digits": "9" * 5000, "@infinite": "1e999", "@lists": "[" * 50_000 + "]" * 50_000,
           "@objects": '{"a":' * 50_000 + "1" + "}" * 50_000, "@open": "[" * 2000, "@bare": "nothing"}
VALUES = (None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-300, float("nan"), float("inf"), -float("inf"),
          2 ** 31, 2 ** 63, 2 ** 64, 10 ** 400, -10 ** 400, "", "0", "1.5", "a\nb", "\x1b[31m\u2028\u202e",
          "\ud800", "x\0y", "é" * 5000, "<|image|>", "../../etc/passwd", "/", "(" * 5000, "$\\frac{$",
          [], [0], [[]], [None] * 3, [1, -1, 1.5], ["\ud800"], {}, {"": 0}, {"\udfff": [1]}, {"a": {}},
          *WRITTEN)

# Parts of other tokenizers.
PARTS = (
    {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "Whitespace"}, {"type": "UnicodeScripts"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}, {"Regex": "(a|a)*$"}, {"Regex": "["},
    {"type": "Split", "pattern": {"Regex": "(x+x+)+y|(.*)*z"}, "behavior": "Removed", "invert": False},
    {"type": "Sequence", "normalizers": [], "pretokenizers": [], "decoders": [], "processors": []},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
    {"type": "Metaspace", "replacement": "x", "prepend_scheme": "always", "split": True},
    {"type": "Digits", "individual_digits": True}, {"type": "Truncate", "max_length": 0}, {"Regex": ""},
    {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, {"type": "Unigram", "vocab": [["a", 0.0]]},
    {"id": 639, "content": "", "single_word": True, "lstrip": True, "rstrip": True, "normalized": True,
     "special": True})
# What a chat template could try.
SNIPPETS = (
    b"range(999999999)", b"('a' * 999999999)", b"messages * 99999", b"2 ** 9999", b"self", b"caller()",
    b"messages | tojson", b"''.__class__", b"messages.append(1)", b"'%999999999d' % 1", b"loop(messages)",
    b"'{:>99999999}'.format(1)", b"lipsum(9999)", b"{% for a in messages %}{% for b in messages %}",
    b"{% endfor %}", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{% include 'x' %}", b"{# ",
    b"strftime_now('%Y' * 999)", b"messages[0:9:-1]", b"{{ 'x' | indent(999999999) }}", b"{% raw %}",
    b"namespace()")


def mutated(rng: Random, name: str, data: bytes, other: bytes) -> bytes:
    """A file's content, damaged one to three times. `other` is what another file holds."""
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3))):
        if name.endswith(JSON_SUFFIXES) and rng.random() < 0.8:
            data = mutate_lines(rng, data) if name.endswith(".part") else mutate_json(rng, data)
        elif name.endswith(".safetensors") and rng.random() < 0.8:
            data = mutate_header(rng, data, other)
        elif name.endswith(".jinja") and rng.random() < 0.6 or rng.random() < 0.1:
            data = mutate_words(rng, data)
        else:
            data = rng.choice(ON_BYTES)(rng, data, other)
    return with_checksums(data) if rng.random() < 0.6 else data


# ----- bytes


def place(rng: Random, data: bytes) -> tuple[int, int]:
    """Where a part of a file begins and ends. Most parts are short, and many are where formats keep sizes."""
    begin = rng.randint(0, min(len(data), rng.choice((64, len(data)))))
    return begin, min(len(data), begin + rng.choice((1, 2, 4, 8, 64, 1000)))


def flip_bits(rng: Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 100)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_end(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[:rng.choice((rng.randint(0, len(data)), -1, 8, 100))]


def cut_begin(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[rng.randint(0, min(len(data), 100)):]


def delete(rng: Random, data: bytes, other: bytes) -> bytes:
    begin, end = place(rng, data)
    return data[:begin] + data[end:]


def insert(rng: Random, data: bytes, other: bytes) -> bytes:
    begin, _ = place(rng, data)
    return data[:begin] + rng.choice((rng.randbytes(rng.randint(1, 20)), *BAD_TEXT)) + data[begin:]


def repeat(rng: Random, data: bytes, other: bytes) -> bytes:
    begin, end = place(rng, data)
    times = min(rng.choice((2, 3, 50, 5000)), MOST // max(1, end - begin))
    return data[:begin] + data[begin:end] * times + data[end:]


def overwrite(rng: Random, data: bytes, other: bytes) -> bytes:
    begin, end = place(rng, data)
    return data[:begin] + rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b" ")) * (end - begin) + data[end:]


def splice(rng: Random, data: bytes, other: bytes) -> bytes:
    begin, end = place(rng, data)
    first, last = place(rng, other)
    return data[:begin] + other[first:last] + data[end:]


def binary_number(rng: Random, data: bytes, other: bytes) -> bytes:
    """A whole number of 1 to 8 bytes becomes an odd one, in either order of bytes."""
    size = rng.choice((1, 2, 4, 8))
    begin, _ = place(rng, data)
    value = rng.choice((0, 1, 2, -1, -2, 255, 256, 5000, 65536, 10 ** 7, 2 ** 31 - 1, 2 ** 31, 2 ** 63))
    number = (value % 256 ** size).to_bytes(size, rng.choice(("little", "big")))
    return data[:begin] + number + data[begin + size:]


def written_number(rng: Random, data: bytes, other: bytes) -> bytes:
    """A number written out in digits becomes an odd one."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data[:100_000]))
    if not found:
        return binary_number(rng, data, other)
    number = rng.choice(found)
    return data[:number.start()] + rng.choice(NUMBERS) + data[number.end():]


def another(rng: Random, data: bytes, other: bytes) -> bytes:
    return rng.choice((b"", b"\n", b" " * 1000, other, other, other))


def recode(rng: Random, data: bytes, other: bytes) -> bytes:
    """The same text in another encoding; the same bytes compressed."""
    if rng.random() < 0.2:
        return zlib.compress(data)
    text = data.decode("utf-8", "replace")
    return text.encode(rng.choice(("utf-16", "utf-32-be", "utf-8-sig", "latin-1", "utf-7")), "replace")


COMMON = (flip_bits, cut_end, delete, insert, repeat, overwrite, splice, binary_number, written_number)
RARE = cut_begin, another, recode
ON_BYTES: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (*COMMON * 4, *RARE)


def with_checksums(data: bytes) -> bytes:
    """A PNG gets the right checksum in every part, or it would be refused for these alone."""
    if not data.startswith(b"\x89PNG"):
        return data
    fixed, at = data[:8], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at:at + 4], "big")
        body = data[at + 4:at + 8 + size]
        fixed += data[at:at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += size + 12
    return fixed + data[at:]


# ----- words


def mutate_words(rng: Random, data: bytes) -> bytes:
    """A word or a sign of a text is dropped, repeated, or replaced by another one of the same text."""
    words = re.findall(rb"\w+|\s+|[^\w\s]", data)
    if not words:
        return data
    for _ in range(rng.choice((1, 2, 5))):
        i = rng.randrange(len(words))
        repeated = words[i] * min(rng.choice((2, 3, 1000, 30_000)), MOST // max(1, len(words[i])))
        words[i] = rng.choice((b"", repeated, rng.choice(words), rng.choice(words), rng.choice(NUMBERS),
                               rng.choice(SNIPPETS), b"{{ " + rng.choice(SNIPPETS) + b" }}"))
    return b"".join(words)


# ----- JSON


def mutate_json(rng: Random, data: bytes) -> bytes:
    """JSON with another value somewhere, or with a key dropped, doubled or renamed. Not JSON: other words."""
    try:
        holder = [json.loads(data)]
    except (ValueError, RecursionError):
        return mutate_words(rng, data)
    container, key = walk(rng, holder)
    change(rng, container, key)
    if not holder:
        return b""
    try:
        text = json.dumps(holder[0], ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):
        return data
    text = re.sub(r'@double\d+":', '":', text)
    for word, written in WRITTEN.items():
        text = text.replace(f'"{word}"', written)
    return text.encode("utf-8", "surrogatepass")


def mutate_lines(rng: Random, data: bytes) -> bytes:
    """A line that is JSON gets another value; or lines are dropped, repeated or put in another order."""
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    kind = rng.randrange(8)
    if kind == 0:
        rng.shuffle(lines)
    elif kind == 1:
        del lines[i]
    elif kind == 2:
        lines.insert(rng.randrange(len(lines)), lines[i])
    else:
        lines[i] = mutate_json(rng, lines[i])
    return b"\n".join(lines)


def mutate_header(rng: Random, data: bytes, other: bytes) -> bytes:
    """The JSON at the beginning of a safetensors file is damaged; mostly its length is said rightly."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end]
    kind = rng.random()
    if kind < 0.4:
        header = mutate_tensor(rng, header)
    elif kind < 0.8:
        header = mutate_json(rng, header)
    else:
        header = rng.choice(ON_BYTES)(rng, header, other)
    length = len(header).to_bytes(8, "little") if rng.random() < 0.9 else data[:8]
    return length + header + data[end:]


def mutate_tensor(rng: Random, header: bytes) -> bytes:
    """A tensor gets another dtype, shape or name, or an empty one is added: the file stays a good one."""
    try:
        entries = json.loads(header)
        names = [name for name, entry in entries.items() if "shape" in entry]
        name = rng.choice(names)
        entry = entries[name]
        kind = rng.randrange(6)
        if kind == 0:
            entry["dtype"] = rng.choice(("F16", "BF16", "I16", "U16"))
        elif kind == 1:
            entry["dtype"], factor = rng.choice((("U8", 2), ("BOOL", 2), ("F8_E4M3", 2), ("F8_E5M2", 2)))
            entry["shape"][-1] *= factor
        elif kind == 2:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["dtype"], width = rng.choice((("F32", 4), ("F64", 8), ("I64", 8), ("C64", 8)))
            entry["shape"] = [size // width]
        elif kind == 3:
            shape = entry["shape"]
            entry["shape"] = rng.choice((shape[::-1], [*shape, 1], [1] * 70 + shape, [math.prod(shape)]))
        elif kind == 4:
            entries[rng.choice((name + "x", name.upper(), "model." + name, "x" * 9999))] = entries.pop(name)
        else:
            entries["x"] = {"dtype": "F32", "shape": [0, 2 ** rng.choice((9, 63))], "data_offsets": [0, 0]}
        return json.dumps(entries).encode()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return mutate_json(rng, header)         # it was damaged before


def walk(rng: Random, holder: list) -> tuple[list | dict, int | str]:
    """Some value inside, as the container and the key that hold it; all levels are likely."""
    container, key = holder, 0
    while isinstance(container[key], (list, dict)) and container[key] and rng.random() < 0.85:
        container = container[key]
        key = rng.choice(list(container)) if isinstance(container, dict) else rng.randrange(len(container))
    return container, key


def change(rng: Random, container: list | dict, key: int | str):
    """Damage the value that `container` has at `key`."""
    value = container[key]
    kind = rng.randrange(11)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[f"{key}@double{rng.randrange(9)}"] = rng.choice((value, *VALUES))
    elif kind == 2 and isinstance(container, dict):
        container[rng.choice(("", key + "x", key.upper(), "\ud800", *container))] = container.pop(key)
    elif kind == 3 and isinstance(value, list):
        many = value * (1 + 2000 // (len(value) + 1))
        container[key] = rng.choice((value * 2, value[::-1], many, value[:1], value + [None]))
    elif kind == 4 and isinstance(value, (int, float)) and abs(value) < 1e15:
        container[key] = rng.choice((-value, value + 1, value - 1, value * 1000, value + 0.5, str(value)))
    elif kind == 5 and isinstance(value, str):
        container[key] = rng.choice((value * 2, value[:-1], value.upper(), value + "\ud800", value * 1000))
    elif kind == 6:
        for _ in range(rng.choice((1, 2, 100, 300))):
            value = rng.choice(([value], {"a": value}))
        container[key] = value
    elif kind == 7:
        other = rng.choice(list(container.values()) if isinstance(container, dict) else container)
        container[key] = copy.deepcopy(other)
    elif kind == 8:
        container[key] = copy.deepcopy(rng.choice(PARTS))
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))
