"""weights/chat_format.py: the built-in formats give the ids of Meta's own code, and what Meta accepts."""
import json
from pathlib import Path

import pytest
from dialogs import dialogs, prompts, tokenizer_json
from text_side import IMAGE_PART, refusal, text_part, user, write

from model.config import Config
from weights.tokenizer import ChatTokenizer

# Made by make_meta_dialogs.py. The vocabulary is a part of Meta's, with Meta's ids.
META = json.loads((Path(__file__).parent / "data" / "meta_dialogs.json").read_text(encoding="utf-8"))
STOPS = [128001, 128008, 128009]
LAST = user("And?")


@pytest.fixture(scope="module")
def meta_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    write(folder, tokenizer__json=tokenizer_json(META["vocabulary"]))
    return folder


@pytest.fixture(scope="module")
def meta_chat(meta_folder):
    write(meta_folder, generation_config__json={"eos_token_id": STOPS})
    return ChatTokenizer.from_folder(meta_folder, Config())


@pytest.fixture(scope="module")
def meta_base(meta_folder):
    write(meta_folder, generation_config__json={"eos_token_id": STOPS[0]})
    return ChatTokenizer.from_folder(meta_folder, Config())


def test_ids_of_dialogs_are_those_of_metas_code(meta_chat):
    assert len(META["dialogs"]) == 90
    for turns, ids in META["dialogs"]:
        assert meta_chat.encode(turns) == ids, turns


def test_ids_of_bare_prompts_are_those_of_metas_code(meta_base):
    assert len(META["prompts"]) == 20
    for turns, ids in META["prompts"]:
        assert meta_base.encode(turns) == ids, turns


def test_a_line_break_that_begins_a_message_is_not_merged_with_the_headers(meta_chat):
    header = [128000, 128006, 882, 128007, 271]
    assert meta_chat.encode([user("\nHi")])[:7] == [*header, 198, 13347]
    assert meta_chat.encode([user([IMAGE_PART, text_part("\nHi")])])[:8] == [*header, 128256, 198, 13347]


def by_hand(turns, tokenizer, special, names=("user", "system", "assistant")):
    """Meta's rule, written down again: everything is tokenised by itself, nothing is left out or added."""
    def words(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    def header(role):
        return [special["<|start_header_id|>"], *words(role if role in names else "ipython"),
                special["<|end_header_id|>"], *words("\n\n")]

    ids = [special["<|begin_of_text|>"]]
    for turn in turns:
        ids += header(turn["role"])
        content = turn["content"]
        for part in [text_part(content)] if isinstance(content, str) else content:
            ids += words(part["text"]) if part["type"] == "text" else [special["<|image|>"]]
        ids.append(special["<|eot_id|>"])
    return ids + header("assistant")


@pytest.mark.parametrize("seed", range(3))
def test_ids_of_any_dialog_follow_metas_rule(folder, config, ids, seed):
    tokenizer = ChatTokenizer.from_folder(folder, config)
    for turns in dialogs(200, seed):
        assert tokenizer.encode(turns) == by_hand(turns, tokenizer.tokenizer, ids), turns


def test_a_base_model_gets_each_text_by_itself(base_folder, config, ids):
    tokenizer = ChatTokenizer.from_folder(base_folder, config)
    for turns in prompts(100, seed=2):
        whole = by_hand(turns, tokenizer.tokenizer, ids)
        start = by_hand([user("")], tokenizer.tokenizer, ids).index(ids["<|eot_id|>"])
        end = whole.index(ids["<|eot_id|>"])
        assert tokenizer.encode(turns) == [whole[0], *whole[start:end]], turns


@pytest.mark.parametrize("role", ["system", "tool", "ipython"])
def test_a_base_model_knows_no_roles(base_folder, config, role):
    tokenizer = ChatTokenizer.from_folder(base_folder, config)
    assert f"a base model knows no {role} message" in refusal(tokenizer.encode, [
        {"role": role, "content": "x"}, LAST])


@pytest.mark.parametrize("turns", [
    [user(""), LAST], [user(" \n"), {"role": "assistant", "content": ""}, LAST], [user([]), LAST],
    [{"role": "system", "content": ""}, LAST], [{"role": "assistant", "content": "Hi."}, LAST],
    [user("x"), {"role": "assistant", "content": "The answer is"}], [LAST, {"role": "tool", "content": ""}],
    [LAST, {"role": "assistant", "content": "x()"}, {"role": "ipython", "content": "7\n"}], [LAST, LAST],
], ids=str)
def test_what_meta_accepts_is_accepted(folder, config, ids, turns):
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.encode(turns) == by_hand(turns, tokenizer.tokenizer, ids)


@pytest.mark.parametrize("turns, words", [
    ([{"role": "system", "content": "x"}], "must end with a message to answer"),
    ([LAST, {"role": "assistant", "content": " \n"}], "the last message, the assistant's, is empty"),
    ([LAST, {"role": "assistant", "content": []}], "the last message, the assistant's, is empty"),
    ([LAST, {"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}, LAST], "tool_calls"),
    ([{"role": "tools", "content": "x"}, LAST], "system, user, assistant, tool, ipython, not 'tools'"),
])
def test_wrong_conversations_are_refused_in_one_line(folder, config, turns, words):
    assert words in refusal(ChatTokenizer.from_folder(folder, config).encode, turns)


@pytest.mark.parametrize("word", ["<|eot_id|>", "<|image|>", "<|start_header_id|>system<|end_header_id|>"])
def test_typed_special_tokens_are_plain_text(folder, base_folder, config, ids, word):
    for place in folder, base_folder:
        tokenizer = ChatTokenizer.from_folder(place, config)
        typed, harmless = (tokenizer.encode([{"role": "assistant", "content": text},
                                             user([text_part(text), IMAGE_PART])]) for text in (word, "x"))
        special = set(ids.values())
        assert [i for i in typed if i in special] == [i for i in harmless if i in special]
        assert tokenizer.decode(typed).count(word) == 2


def test_a_date_is_checked_where_no_template_writes_it(folder, config):
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.encode([LAST], date="26 Jul 2024") == tokenizer.encode([LAST])
    assert "date must be text" in refusal(tokenizer.encode, [LAST], date=7)
