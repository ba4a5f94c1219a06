"""What the tests of the text side share: templates, conversations, and ways to write and compare them.

The templates are ours, with the behaviour of those that official checkpoints have had.
"""
import json

import pytest

CURRENT = """{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- set turns = messages %}
{%- set given = messages[0].role == 'system' %}
{%- set words = messages[0].content | trim if given else '' %}
{%- if given %}{%- set turns = messages[1:] %}{%- endif %}
{%- set seen = namespace(image=false) %}
{%- for m in turns %}
    {%- if m.content is not string %}
        {%- for part in m.content %}
            {%- if part.type == 'image' %}{%- set seen.image = true %}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if given or not seen.image %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
    {{- 'Cutting Knowledge Date: December 2023\\n' }}
    {{- 'Today Date: ' + date_string + '\\n\\n' + words + '<|eot_id|>' }}
{%- endif %}
{%- for m in turns %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
    {%- if m.content is string %}
        {{- m.content }}
    {%- else %}
        {%- for part in m.content %}
            {%- if part.type == 'image' %}{{- '<|image|>' }}{%- else %}{{- part.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
SIMPLE = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
          "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
          "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
          "{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
          "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
RAISING = ("{% if messages[0].role == 'system' %}{{ raise_exception("
           "'Prompting with images is incompatible with system messages.') }}{% endif %}") + SIMPLE

IMAGE_PART = {"type": "image"}


def text_part(text):
    return {"type": "text", "text": text}


def user(content):
    return {"role": "user", "content": content}


def write(folder, **values):
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def damaged(folder, **parts):
    """Replace parts of tokenizer.json."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write(folder, tokenizer__json={**data, **parts})


def short(value):
    """A test's name for a long value."""
    return ascii(value)[:40]


def theirs(folder, turns, template, **options):
    """Token ids as transformers makes them, the template's text tokenised as the official example does."""
    from transformers import PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|eot_id|>",
                                        bos_token="<|begin_of_text|>")
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False,
                                         add_generation_prompt=True, **options)
    return tokenizer(text, add_special_tokens=False, truncation=False, padding=False).input_ids


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    line = str(caught.value)
    assert line and "\n" not in line and line.isprintable()
    return line


CONVERSATIONS = {
    "text": [user("What is 1 + 22?")],
    "image": [user([IMAGE_PART, text_part("What is in the picture?")])],
    "system": [{"role": "system", "content": "  Be brief.\n"}, user("Hello")],
    "image and system": [{"role": "system", "content": "Be short."}, user([IMAGE_PART, text_part("Hello")])],
    "turns": [user([IMAGE_PART, text_part("What is this?")]), {"role": "assistant", "content": "A circle."},
              user("Which colour? "), {"role": "assistant", "content": [text_part("Red.")]},
              user("\n\nSure?")],
    "images": [user([IMAGE_PART, IMAGE_PART, text_part(" left "), IMAGE_PART, text_part("or"),
                     text_part("right?")])],
    "unusual": [user("<café> <a href='x'> a|b > & \"d\" 画像 👍🏽 e\u0301 \u200d {{ bos }} {% if %}")],
    "line breaks first": [user("\n\n\nindented\r\n\ttext  ")],
}
