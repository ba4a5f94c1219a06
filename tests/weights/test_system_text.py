"""A system text that a template refuses beside an image moves into the first user's turn."""
import pytest
from text_side import CURRENT, IMAGE_PART, RAISING, SIMPLE, text_part, user

from weights.chat_format import check_messages
from weights.chat_template import ChatTemplate, without_marks
from weights.system_text import fold_system

# As one of the official templates: it refuses a system text where there is an image, in any turn.
REFUSING = """{%- set seen = namespace(image=false) %}
{%- for m in messages %}{%- for part in m.content %}
    {%- if part.type == 'image' %}{%- set seen.image = true %}{%- endif %}
{%- endfor %}{%- endfor %}
{%- if seen.image and messages[0].role == 'system' %}
    {{- raise_exception('Prompting with images is incompatible with system messages.') }}
{%- endif %}""" + SIMPLE
SILENT = SIMPLE.replace("for m in messages %}", "for m in messages if m['role'] != 'system' %}", 1)
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "A star."}
ABOUT_IMAGE = user([IMAGE_PART, IMAGE_PART, text_part("What is this?")])


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, None, {"<|image|>": 1, "<|eot_id|>": 2}, "<|eot_id|>")


@pytest.mark.parametrize("source", [REFUSING])
@pytest.mark.parametrize(("given", "expected"), [
    ([SYSTEM, ABOUT_IMAGE],
     [user([IMAGE_PART, IMAGE_PART, text_part("Be brief.\n\nWhat is this?")])]),
    ([SYSTEM, user([IMAGE_PART])], [user([IMAGE_PART, text_part("Be brief.")])]),
    ([SYSTEM, user("Hi"), ASSISTANT, ABOUT_IMAGE],
     [user([text_part("Be brief.\n\nHi")]), ASSISTANT, ABOUT_IMAGE]),
    ([{"role": "system", "content": [text_part("Be "), text_part("brief.")]}, ABOUT_IMAGE],
     [user([IMAGE_PART, IMAGE_PART, text_part("Be brief.\n\nWhat is this?")])]),
])
def test_it_is_folded(source, given, expected):
    before = repr(given)
    assert fold_system(template(source), given) == expected
    assert repr(given) == before
    text = without_marks(template(source).render(check_messages(expected)))
    assert text.count("Be brief.\n\n") + text.count("Be brief.<|eot_id|>") == 1 and "system" not in text


@pytest.mark.parametrize(("source", "given"), [
    (REFUSING, [SYSTEM, user("Hi")]),               # no image
    (REFUSING, [ABOUT_IMAGE]),                      # no system text
    (CURRENT, [SYSTEM, ABOUT_IMAGE]),               # this template takes both
    (SIMPLE, [SYSTEM, ABOUT_IMAGE]),
    (RAISING, [SYSTEM, ABOUT_IMAGE]),               # never a system text, with an image or without
    (SILENT, [SYSTEM, ABOUT_IMAGE]),
    (REFUSING, [SYSTEM, ASSISTANT, ABOUT_IMAGE]),   # no user's turn to fold it into
    (REFUSING, []), (REFUSING, "Hi"), (REFUSING, [{"role": "system"}]), (REFUSING, [SYSTEM]),
])
def test_everything_else_stays_as_it_is(source, given):
    assert fold_system(template(source), given) is given


def test_metas_own_formats_take_every_system_text_or_none():
    given = [SYSTEM, ABOUT_IMAGE]
    assert fold_system(None, given) is given


def test_the_date_is_that_of_the_conversation():
    source = "{% if date_string is not defined %}{{ raise_exception('no date') }}{% endif %}" + REFUSING
    assert fold_system(template(source), [SYSTEM, ABOUT_IMAGE], "1 April 2024")[0]["role"] == "user"
    given = [SYSTEM, ABOUT_IMAGE]
    assert fold_system(template(source), given) is given
