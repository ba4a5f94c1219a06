"""The files of the text side: each thing that can be wrong with one is named in one line."""
import json
import os

import pytest
from text_side import damaged, refusal, short, write

from model.config import Config, TextConfig
from weights.chat_template import read_settings
from weights.tokenizer import ChatTokenizer


@pytest.mark.parametrize("name, content, words", [
    ("tokenizer__json", "{", "not readable as a tokenizer"),
    ("tokenizer__json", "", "not readable as a tokenizer"),
    ("tokenizer__json", {"version": "1.0"}, "not readable as a tokenizer"),
    ("tokenizer_config__json", "{'a'", "not readable as JSON"),
    ("generation_config__json", "[1]", "holds a list, not an object"),
    ("generation_config__json", "{", "not readable as JSON"),
    ("generation_config__json", {"eos_token_id": "</s>"}, "not '</s>'"),
    ("generation_config__json", {"eos_token_id": []}, "not []"),
    ("generation_config__json", {"eos_token_id": [1, 2 ** 40]}, "eos_token_id must be"),
    ("chat_template__json", "nonsense", "not readable as JSON"),
    ("chat_template__json", {"chat_template": 3}, "neither text nor a list"),
    ("chat_template__json", {"chat_template": "{% for %}"}, "does not parse"),
    ("chat_template__jinja", "{{ 'a", "does not parse"),
    ("tokenizer_config__json", {"chat_template": [{"name": "rag", "template": "x"}]}, "named 'default'"),
    ("tokenizer_config__json", {"chat_template": ["x"]}, "named 'default'"),
])
def test_broken_files_are_named(folder, config, name, content, words):
    write(folder, **{name: content})
    line = refusal(ChatTokenizer.from_folder, folder, config)
    assert words in line and str(folder / name.replace("__", ".")) in line


def test_missing_or_unreadable_files_are_named(folder, config, tmp_path):
    assert str(tmp_path / "tokenizer.json") in refusal(ChatTokenizer.from_folder, tmp_path, config)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja: not readable as text" in refusal(ChatTokenizer.from_folder, folder, config)


def test_a_tokenizer_of_another_model_is_refused(folder, config, ids):
    path, image = folder / "tokenizer.json", ids["<|image|>"]
    official = json.loads(path.read_text(encoding="utf-8"))

    def line(change, settings=config):
        data = json.loads(json.dumps(official))
        change(data)
        write(folder, tokenizer__json=data)
        return refusal(ChatTokenizer.from_folder, folder, settings)

    def without(token):
        def change(data):
            data["added_tokens"] = [item for item in data["added_tokens"] if item["content"] != token]
            data["post_processor"] = None
        return change

    def plain(data):
        next(item for item in data["added_tokens"] if item["content"] == "<|image|>")["special"] = False

    def sentencepiece(data):
        data["decoder"] = {"type": "Fuse"}

    assert "lacks the special token <|image|>" in line(without("<|image|>"))
    def short(data):
        data["added_tokens"].append({**data["added_tokens"][0], "content": "e", "id": 401})

    assert "the special token 'e' is one character" in line(short)
    assert "lacks the special token <|image|>" in line(plain)
    assert "lacks the special token <|begin_of_text|>" in line(without("<|begin_of_text|>"))
    assert "not a byte-level tokenizer" in line(sentencepiece)
    other = Config(text=config.text, image_token_index=image + 1)
    assert f"is token {image}, but config.json says image_token_index {image + 1}" in line(dict, other)
    small = Config(text=TextConfig(vocab_size=image - 8), image_token_index=image)
    assert "but the model embeds only" in line(dict, small)


@pytest.mark.parametrize("charsmap", ["", "AAAA"])
def test_a_panic_while_a_tokenizer_is_read_is_one_line(folder, config, capfd, charsmap):
    damaged(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap})
    line = refusal(ChatTokenizer.from_folder, folder, config)
    assert "tokenizer.json: not readable as a tokenizer: Precompiled" in line
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name, content, words", [
    ("generation_config__json", '{"eos_token_id": 1e400}', "not inf"),
    ("generation_config__json", '{"eos_token_id": 1' + "0" * 400 + "}", "not 1000"),
    ("generation_config__json", '{"eos_token_id": 1' + "0" * 4299 + "}", "not "),
    ("generation_config__json", '{"eos_token_id": ' + "[" * 500 + "]" * 500 + "}", "not [[["),
    ("generation_config__json", '{"eos_token_id": true}', "not True"),
    ("generation_config__json", '{"eos_token_id": [1.0]}', "not [1.0]"),
    ("generation_config__json", '{"eos_token_id": -1}', "not -1"),
    ("generation_config__json", '{"eos_token_id": 5000}', "a token id below 408"),
    ("generation_config__json", "[" * 100_000, "not readable as JSON"),
    ("tokenizer_config__json", '{"eos_token": 7}', "eos_token must be valid text, not 7"),
    ("tokenizer_config__json", '{"eos_token": {"content": ["x"]}}', "eos_token must be valid text"),
    ("tokenizer_config__json", "null", "holds a NoneType, not an object"),
    ("tokenizer__json", "[" * 100_000, "not readable as a tokenizer"),
    ("tokenizer__json", '{"version": "' + "9" * 100_000 + '"}', "not readable as a tokenizer"),
], ids=short)
def test_odd_values_are_refused_in_one_line(folder, config, name, content, words):
    write(folder, **{name: content})
    line = refusal(ChatTokenizer.from_folder, folder, config)
    assert words in line and name.replace("__", ".") in line and len(line) < 700


@pytest.mark.parametrize("eos", [(), (-1,), (5000,)])
def test_stop_tokens_of_config_json_are_checked_too(folder, config, eos):
    write(folder, generation_config__json={})
    config = Config(text=TextConfig(vocab_size=config.text.vocab_size, eos_token_id=eos),
                    image_token_index=config.image_token_index)
    line = refusal(ChatTokenizer.from_folder, folder, config)
    assert f"{folder / 'config.json'}: eos_token_id must be a token id below 408" in line


FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.json",
         "chat_template.jinja")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_but_cannot_be_read_is_an_error(folder, config, name):
    path = folder / name
    path.unlink(missing_ok=True)
    for there in (lambda: path.symlink_to(name), lambda: path.symlink_to("nowhere"), path.mkdir,
                  lambda: os.mkfifo(path)):
        there()
        assert f"{path}: " in refusal(ChatTokenizer.from_folder, folder, config)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_permission_is_an_error(folder, config, without_permission, name):
    path = folder / name
    if not path.exists():
        write(folder, **{name.replace(".", "__"): {}})
    with without_permission(path):
        line = refusal(ChatTokenizer.from_folder, folder, config)
    assert f"{path}: cannot be read (Permission denied)" in line


def test_a_folder_without_permission_is_an_error(folder, config, without_permission):
    with without_permission(folder):
        line = refusal(ChatTokenizer.from_folder, folder, config)
        assert "Permission denied" in refusal(read_settings, folder / "generation_config.json")
    assert f"{folder / 'tokenizer.json'}: cannot be read (Permission denied)" in line


def test_a_folder_with_a_name_too_long_is_an_error(tmp_path, config):
    for name in "x" * 300, "x/" * 3000:
        line = refusal(ChatTokenizer.from_folder, tmp_path / name, config)
        assert "tokenizer.json: cannot be read (File name too long)" in line and len(line) < 300


def test_a_library_error_has_a_bounded_length(folder, config):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["type"] = "x" * 100_000
    write(folder, tokenizer__json=data)
    assert len(refusal(ChatTokenizer.from_folder, folder, config)) < 700


LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DOUBLED = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}


def split(pattern: dict) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": [*steps], "normalizers": [*steps]}


@pytest.mark.parametrize("parts, words", [
    ({"pre_tokenizer": sequence(split({"Regex": "(?:.?.?){12}(?!)|x"}), LETTERS)},  # takes 12 ms a character
     "it splits text by the pattern '(?:.?.?){12}(?!)|x', not by Llama 3's"),
    ({"pre_tokenizer": sequence(sequence(split({"Regex": "(a|a)*$"})), LETTERS)}, "pattern '(a|a)*$'"),
    ({"pre_tokenizer": split({"Regex": "x" * 5000})}, "pattern 'xxx"),
    ({"pre_tokenizer": sequence(*[LETTERS] * 30)}, "it takes 30 steps to split text, where Llama 3 takes 2"),
    ({"normalizer": sequence(*[DOUBLED] * 30)}, "it takes 30 steps"),
    ({"normalizer": DOUBLED}, "its normalizer 'Replace' is not supported; Llama 3's has none"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 5000}}, "its normalizer 'Prepend'"),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "not a byte-level tokenizer")])
def test_what_could_take_any_time_or_memory_is_refused(folder, config, parts, words):
    """30 steps that each double the text would take all memory."""
    damaged(folder, **parts)
    line = refusal(ChatTokenizer.from_folder, folder, config)
    assert words in line and len(line) < 500 + len(str(folder))


@pytest.mark.parametrize("parts", [
    {"pre_tokenizer": None}, {"pre_tokenizer": LETTERS}, {"normalizer": {"type": "NFKC"}},
    {"normalizer": sequence({"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"})},
    {"pre_tokenizer": sequence(split({"String": " "}), {"type": "Whitespace"}, LETTERS)}])
def test_other_ways_to_split_text_are_read(folder, config, parts):
    damaged(folder, **parts)
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.decode(tokenizer.tokenizer.encode("a12").ids) == "a12"
