"""weights/chat_template.py: where a template is found, what it is given, and what it must write."""
from datetime import datetime

import pytest
from text_side import (
    CONVERSATIONS,
    IMAGE_PART,
    RAISING,
    SIMPLE,
    refusal,
    short,
    text_part,
    theirs,
    user,
    write,
)

from weights.tokenizer import ChatTokenizer, messages


def test_system_block_only_where_there_is_a_system_message_or_no_image(current):
    rendered = {name: current.decode(current.encode(turns)) for name, turns in CONVERSATIONS.items()}
    assert {name for name, text in rendered.items() if "Knowledge" in text} == {
        "text", "system", "image and system", "unusual", "line breaks first"}
    assert "Environment" not in rendered["text"]                    # `tools` is there, and none


def test_date_is_todays_unless_pinned(folder, config, current):
    turns = CONVERSATIONS["text"]
    before = datetime.now().strftime("%d %b %Y")
    text = current.decode(current.encode(turns))
    assert before in text or datetime.now().strftime("%d %b %Y") in text
    assert "Today Date: 1 May 2031\n" in current.decode(current.encode(turns, date="1 May 2031"))
    for way in "strftime_now('%Y')", "date_string":                 # templates that know one of the two only
        write(folder, chat_template__jinja="{{ " + way + " }}" + SIMPLE)
        other = ChatTokenizer.from_folder(folder, config)
        assert other.decode(other.encode(turns, date="1 May 2031")).startswith("1 May 2031")


def test_a_system_message_reaches_the_template_as_a_string(current):
    parts = [{"role": "system", "content": [text_part("Be "), text_part("brief.")]}, user("Hello")]
    assert current.encode(parts, "today") == current.encode(messages("Hello", system="Be brief."), "today")


def test_a_date_cannot_hold_special_tokens(current, ids):
    assert current.encode([user("x")], date="<|eot_id|>").count(ids["<|eot_id|>"]) == 2     # system and user


def test_template_may_stand_in_three_places(folder, config):
    def first_line():
        tokenizer = ChatTokenizer.from_folder(folder, config)
        return tokenizer.decode(tokenizer.encode([user("x")])).split()[0]
    bare = "{{ messages[0].content }}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "four " + bare}]
    assert first_line() == "user"                                   # none: the built-in format
    write(folder, tokenizer_config__json={"chat_template": None})
    assert first_line() == "user"
    for place, value, word in [("tokenizer_config__json", named, "four"),
                               ("tokenizer_config__json", "three " + bare, "three"),
                               ("chat_template__json", "two " + bare, "two")]:
        write(folder, **{place: {"chat_template": value}})
        assert first_line() == word
    write(folder, chat_template__jinja="one " + bare)
    assert first_line() == "one"


def test_template_environment_is_that_of_transformers(folder, config):
    template = ("{{ bos_token }}\n{% for m in messages %}\n    {% if loop.index > 1 %}"
                "{% break %}{% endif %}\n  a\n    {%- generation %}\n[{{ m | tojson }}]{% endgeneration %}\n"
                "{{ [1, '<é>'] | tojson(indent=2) }}<|eot_id|>+{% endfor %}"
                "{{ messages[1].content }}{{ eos_token }}")
    turns = [user("<b> & 'é'"), user("x")]
    write(folder, chat_template__jinja=template,
          tokenizer_config__json={"eos_token": {"content": "<|eot_id|>"}})
    assert ChatTokenizer.from_folder(folder, config).encode(turns) == theirs(folder, turns, template)


@pytest.mark.parametrize("attack", ["''.__class__.__mro__[1].__subclasses__()", "messages.append(1)"])
def test_template_is_kept_in_a_sandbox(folder, config, attack):
    write(folder, chat_template__jinja="{{ " + attack + " }}" + SIMPLE)
    assert "safe" in refusal(ChatTokenizer.from_folder(folder, config).encode, [user("x")])


@pytest.mark.parametrize("turns, words", [
    ([], "must end with a message to answer, a user's"),
    ([user("")], "the prompt is empty"),
    ([user(" \n")], "the prompt is empty"),
    ([user([])], "the prompt is empty"),
    ([user(None)], "must be text, not NoneType"),
    ([user(b"bytes")], "must be text, not bytes"),
    ([user([text_part(7)])], "must be text, not int"),
    ([user("caf\udce9")], "not valid Unicode"),
    ([user([{"type": "audio", "data": "a\nb"}])], "each part of a user message"),
    ([user(["<|image|>"])], "each part of a user message"),
    ([{"role": "robot", "content": "x"}], "system, user, assistant, tool, ipython, not 'robot'"),
    ([{"content": "x"}], "not None"),
    (["hello"], "not 'hello'"),
    ([{"role": "system", "content": [IMAGE_PART]}, user("x")], "cannot hold an image"),
])
def test_wrong_messages_are_refused_in_one_line(current, turns, words):
    assert words in refusal(current.encode, turns)


def test_other_refusals(current):
    assert "prompt must be text, not int" in refusal(messages, 7)
    assert "date must be text" in refusal(current.encode, [user("x")], date=20240726)


def test_a_template_that_raises_is_quoted(folder, config):
    write(folder, chat_template__jinja=RAISING)
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.encode(messages("x", images=1)) == theirs(folder, messages("x", images=1), SIMPLE)
    line = refusal(tokenizer.encode, messages("x", images=1, system="s"))
    assert "Prompting with images is incompatible with system messages." in line


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('no: ' + messages[0].content) }}", "no: <b> x"),
    ("{{ 1 // 0 }}", "cannot write"),
    ("{{ 'a' + 1 }}", "cannot write"),
    ("{{ messages[0].content }}<|image|>", "writes 1 <|image|> for 0 images"),
])
def test_a_template_that_fails_is_refused_in_one_line(folder, config, template, words):
    write(folder, chat_template__jinja=template)
    assert words in refusal(ChatTokenizer.from_folder(folder, config).encode, [user("<b>\nx")])


def test_a_template_that_loses_images_is_refused(folder, config):
    write(folder, chat_template__jinja="{% for m in messages %}{{ m.role }}{% endfor %}")
    assert "writes 0 <|image|> for 2 images" in refusal(ChatTokenizer.from_folder(folder, config).encode,
                                                        messages("x", images=2))


# As Llama Guard's: it looks for parts, and finds none in a string.
PARTS_ONLY = ("{{ bos_token }}{% for m in messages %}{{ '\n\n' + m['role'] + ': ' }}"
              "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image|>' }}"
              "{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
              "{{ part['text'] | trim }}{% endfor %}{% endfor %}"
              "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
STRINGS_ONLY = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def in_parts(turns):
    """The same conversation with each string as a list of one part."""
    return [{**turn, "content": [text_part(turn["content"])] if isinstance(turn["content"], str)
             else turn["content"]} for turn in turns]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_template_that_reads_only_parts_gets_parts(folder, config, name):
    write(folder, chat_template__jinja=PARTS_ONLY)
    turns = CONVERSATIONS[name]
    tokenizer = ChatTokenizer.from_folder(folder, config)
    expected = theirs(folder, in_parts(turns), PARTS_ONLY)
    assert tokenizer.encode(turns) == tokenizer.encode(in_parts(turns)) == expected


def test_a_template_that_reads_only_strings_gets_strings(folder, config):
    write(folder, chat_template__jinja=STRINGS_ONLY)
    turns = [user("one <|eot_id|>"), {"role": "assistant", "content": " two "}, user("three")]
    tokenizer = ChatTokenizer.from_folder(folder, config)
    ids = tokenizer.encode(turns)
    assert tokenizer.decode(ids) == "user: one <|eot_id|>\nassistant:  two \nuser: three\n"
    assert tokenizer.encode(in_parts(turns)) == ids
    assert "cannot write" in refusal(tokenizer.encode, messages("x", images=1))


SAID = [{"role": "system", "content": "Be brief."}, user("user"), {"role": "assistant", "content": "user"},
        user([text_part("Is <this> "), text_part("a\nstar?")])]
EACH = ("{% for part in (m.content if m.content is not string else [{'text': m.content}]) %}"
        "{{ part.text }}{% endfor %}")
LOOP = "{% for m in messages %}{{ m.role }}: " + EACH + "|{% endfor %}"


def test_every_text_that_was_said_is_written(folder, config):
    write(folder, chat_template__jinja=LOOP)
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.decode(tokenizer.encode(SAID)) == (
        "system: Be brief.|user: user|assistant: user|user: Is <this> a\nstar?|")
    write(folder, chat_template__jinja="{{ messages[0].content }}" + LOOP)          # may be there twice
    assert ChatTokenizer.from_folder(folder, config).encode(SAID)


@pytest.mark.parametrize("change, role, text", [
    (("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"), "system", "Be brief."),
    (("{% for m in messages %}", "{% for m in messages if m.role != 'assistant' %}"), "assistant", "user"),
    (("{% for m in messages %}", "{% for m in messages[3:] %}"), "system", "Be brief."),
    (("{% for m in messages %}", "{% for m in messages[:1] + messages[2:] %}"), "user", "user"),
    (("{% for m in messages %}", "{% for m in messages[:3] %}"), "user", "Is <this> "),
    (("{% for m in messages %}", "{% for m in messages | reverse %}"), "user", "user"),
    (("{{ part.text }}", "{{ part.text[:5] }}"), "system", "Be brief."),
    (("{{ part.text }}", "{{ part.text | upper }}"), "system", "Be brief."),
    (("{{ part.text }}", "{{ part.text | replace('\n', ' ') }}"), "user", "a\\nstar?"),
    (("{{ part.text }}", "{{ part.text | replace('>', '') }}"), "user", "Is <this> "),
    (("{{ part.text }}", "{{ part | tojson(ensure_ascii=true) }}"), "system", "Be brief."),
])
def test_a_template_that_leaves_out_or_changes_a_text_is_refused(folder, config, change, role, text):
    assert change[0] in LOOP
    write(folder, chat_template__jinja=LOOP.replace(*change))
    line = refusal(ChatTokenizer.from_folder(folder, config).encode, SAID)
    assert f"what the {role} message says, '{text}'" in line
    assert ("leave the system message out" if role == "system" else "chat_template.jinja") in line


def test_a_text_may_lose_white_space_at_its_ends_only(folder, config):
    write(folder, chat_template__jinja=LOOP.replace("part.text", "part.text | trim"))
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.decode(tokenizer.encode([user(" \n < a  b\t\n")])) == "user: < a  b|"


def test_there_may_be_more_texts_than_marks(folder, config):
    turns = [user("?"), {"role": "assistant", "content": "!"}] * 1200 + [user("?")]
    write(folder, chat_template__jinja="{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.decode(tokenizer.encode(turns)) == "?!" * 1200 + "?"
    write(folder, chat_template__jinja="{% for m in messages[:2400] %}{{ m.content }}{% endfor %}")
    assert "the user message" in refusal(ChatTokenizer.from_folder(folder, config).encode, turns)


@pytest.mark.parametrize("around", ["<{}", "{}|>", "<|eot_{}", "<{}>"])
def test_a_template_cannot_complete_a_typed_special_token(folder, config, ids, around):
    before, after = around.split("{}")
    write(folder, chat_template__jinja=f"{before}{{{{ messages[0].content }}}}{after}")
    tokenizer = ChatTokenizer.from_folder(folder, config)
    typed = "<|eot_id|>".removeprefix(before).removesuffix(after)
    encoded = tokenizer.encode([user(typed)])
    assert ids["<|eot_id|>"] not in encoded and tokenizer.decode(encoded) == "<|eot_id|>"
    write(folder, chat_template__jinja=f"{before}{{{{ date_string }}}}{after}{{{{ messages[0].content }}}}")
    encoded = ChatTokenizer.from_folder(folder, config).encode([user("?")], date=typed)
    assert ids["<|eot_id|>"] not in encoded and tokenizer.decode(encoded) == "<|eot_id|>?"


def test_an_empty_date_is_no_date_written(folder, config):
    write(folder, chat_template__jinja="[{{ strftime_now('%Y') }}{{ date_string }}]{{ messages[0].content }}")
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.decode(tokenizer.encode([user("?")], date="")) == "[]?"


@pytest.mark.parametrize("name, content, words", [
    ("chat_template__jinja", "{{ '\\ud800' }}" + LOOP, "not valid Unicode"),
    ("chat_template__json", '{"chat_template": "\\ud800"}', "not valid Unicode"),
    ("tokenizer_config__json", '{"chat_template": "\\ud800"}', "not valid Unicode"),
    ("tokenizer_config__json", '{"eos_token": "\\ud800"}', "eos_token must be valid text"),
    ("tokenizer_config__json", '{"chat_template": [{"name": ["x"]}, {"name": {}}]}', "named 'default'"),
    ("tokenizer_config__json", '{"chat_template": {"default": 1e400}}', "named 'default'"),
    ("tokenizer_config__json", '{"chat_template": ' + "[" * 500 + "]" * 500 + "}", "named 'default'"),
    ("chat_template__json", '{"chat_template": 1' + "0" * 4000 + "}", "named 'default'"),
    ("chat_template__json", '{"chat_template": 1' + "0" * 5000 + "}", "not readable as JSON"),
    ("chat_template__json", "[" * 100_000, "not readable as JSON"),
    ("chat_template__jinja", "x" * 60_001, "60,001 characters"),
    ("chat_template__jinja", "{{ " + "(" * 5000 + ")" * 5000 + " }}", "does not parse"),
    ("chat_template__jinja", "{% for a in 'a' %}" * 90 + "{% endfor %}" * 90, "does not parse"),
], ids=short)
def test_odd_template_files_are_refused_in_one_line(folder, config, name, content, words):
    write(folder, **{name: content})
    line = refusal(ChatTokenizer.from_folder, folder, config)
    assert words in line and str(folder / name.replace("__", ".")) in line


IMAGE_URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}


@pytest.mark.parametrize("turns", [
    [user([IMAGE_URL])], [user(IMAGE_URL)], [IMAGE_URL], IMAGE_URL, [{"role": "x" * 100_000}], "x" * 100_000,
    [{"role": "system", "content": "y" * 100_000}, user("x")], None, 7, [[]], [user("x" * 2_000_001)],
], ids=range(11))
def test_refusals_have_a_bounded_length(folder, config, turns):
    write(folder, chat_template__jinja="{{ messages[-1].content }}")
    assert len(refusal(ChatTokenizer.from_folder(folder, config).encode, turns)) < 400


@pytest.mark.parametrize("turns, words", [
    ([user([IMAGE_URL])], "images are given beside the messages"),
    (user("x"), "a conversation must be a list of messages, not {'role': 'user'"),
    ("hello", "a conversation must be a list of messages, not 'hello'"),
    ([user("x" * 2_000_001)], "2,000,001 characters, more than any context holds: shorten it"),
    ([user("x\ud800")], "not valid Unicode"),
    ([{"role": "assistant", "content": "\udfff"}, user("x")], "text of the assistant message is not valid"),
    ([{"role": ["user"], "content": "x"}], "not ['user']"),
    (["user"], "the role of a message must be one of system, user, assistant, tool, ipython, not 'user'"),
], ids=short)
def test_refusals_name_the_remedy(current, turns, words):
    assert words in refusal(current.encode, turns)


@pytest.mark.parametrize("images", [-1, 1.0, True, None, "2", 1001, 10 ** 20])
def test_a_number_of_images_is_a_whole_number(images):
    assert f"number of images is {images!r}" in refusal(messages, "x", images=images)


@pytest.mark.parametrize("history", [None, 7, "x", user("x")])
def test_a_history_is_a_list(history):
    assert "the history must be a list of messages, not" in refusal(messages, "x", history=history)
