"""weights/chat_template.py: last turns that are not the user's, blank turns and tools, as transformers."""
import pytest
from text_side import CURRENT, IMAGE_PART, SIMPLE, refusal, text_part, theirs, user, write

from weights.tokenizer import ChatTokenizer

# As official templates: a tool's result is written as JSON.
HEADER = "{{ '<|start_header_id|>' + m['role']"
AS_JSON = SIMPLE.replace(HEADER, (
    "{% if m['role'] in ('tool', 'ipython') %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | tojson }}{{ '<|eot_id|>' }}{% continue %}{% endif %}") + HEADER)
CALL = {"role": "assistant", "content": '{"name": "look", "parameters": {}}'}
ENDINGS = {
    "answer": [user("\nWhat?"), {"role": "assistant", "content": "\nA red "}],
    "answer in parts": [user([IMAGE_PART, text_part("\nA"), text_part("\nB")]),
                        {"role": "assistant", "content": [text_part("It "), text_part("\nis")]}],
    "two answers": [user("What?"), {"role": "assistant", "content": "A."},
                    {"role": "assistant", "content": "B."}],
    "blank turns": [user(""), {"role": "assistant", "content": " \n"}, user([]), user("Hello?")],
    "tool": [user("Look."), CALL, {"role": "tool", "content": "7 <b> of \"9\"\n\t画像"}],
    "blank tool": [user("Look."), CALL, {"role": "ipython", "content": ""}],
    "tool in parts": [user("Look."), CALL, {"role": "tool", "content": [text_part("a\\b\n"), text_part("c")]},
                      user("And?")],
}


@pytest.mark.parametrize("template", [CURRENT, SIMPLE, AS_JSON], ids=["current", "simple", "as JSON"])
@pytest.mark.parametrize("name", ENDINGS)
def test_same_tokens_as_transformers(folder, config, template, name):
    write(folder, chat_template__jinja=template)
    turns = ENDINGS[name]
    ours = ChatTokenizer.from_folder(folder, config).encode(turns, date="26 Jul 2024")
    assert ours == theirs(folder, turns, template, date_string="26 Jul 2024")


@pytest.mark.parametrize("content", ["<|eot_id|>", "\"<|image|>\"\n", "<"])
def test_a_tool_cannot_write_special_tokens(folder, config, ids, content):
    write(folder, chat_template__jinja=AS_JSON)
    tokenizer = ChatTokenizer.from_folder(folder, config)
    typed, harmless = (tokenizer.encode([user("x"), {"role": "tool", "content": text}])
                       for text in (content, "x"))
    special = set(ids.values())
    assert [i for i in typed if i in special] == [i for i in harmless if i in special]


@pytest.mark.parametrize("change", [("| tojson }}", "| upper }}"), ("| tojson }}", "| length }}")])
def test_a_tools_result_that_is_changed_is_noticed(folder, config, change):
    write(folder, chat_template__jinja=AS_JSON.replace(*change))
    line = refusal(ChatTokenizer.from_folder(folder, config).encode, [
        user("x"), {"role": "tool", "content": "a\nred \"star\""}])
    assert "changes what the tool message says" in line


def test_an_answer_may_not_be_written_as_json(folder, config):
    write(folder, chat_template__jinja=AS_JSON.replace("('tool', 'ipython')", "('assistant',)"))
    line = refusal(ChatTokenizer.from_folder(folder, config).encode, [
        user("x"), {"role": "assistant", "content": "a\nb"}])
    assert "changes what the assistant message says" in line
