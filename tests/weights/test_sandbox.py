"""weights/sandbox.py and meter.py: a chat template is foreign code, but it ends soon whatever it does."""
import pytest
from text_side import CONVERSATIONS, CURRENT, refusal, short, theirs, user, write

from weights.meter import WORK, Meter
from weights.sandbox import compile_template, render
from weights.tokenizer import ChatTokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
GROW = "{% set ns = namespace(x='ab', y=['ab']) %}{% for i in range(99) %}{% set GROWING %}{% endfor %}"
TEXTS = "{% set s = 'a' * 99999 %}{% set l = ['a'] * 999 %}"
MANY = TEXTS + "{% for i in range(99999) %}"
NEST = ("{% set ns = namespace(x=()) %}{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
        "{% for i in range(99) %}")


def run(source):
    """What a template writes with a small meter, or the words of the error."""
    meter = Meter(characters=0)
    meter.left = 2 ** 19
    try:
        return render(compile_template(source), {"messages": MESSAGES, "tools": None}, meter)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if false %}{% endfor %}",
    TEXTS + "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(n) %}{% if n %}{{ caller(n) }}{{ caller(n) }}{% endif %}{% endmacro %}"
    "{% for i in range(99999) %}{% call(n) m(1) %}{{ n }}{% endcall %}{% endfor %}",
    "{% for i in [[[[1] * 99] * 99] * 99] recursive %}{{ loop(i) if i is not number }}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}", "{{ 10 ** 9 * 'a' }}", "{{ [1] * 10 ** 9 }}", "{{ (1,) * 10 ** 9 }}",
    "{% for i in range(99999) %}1234567890{% endfor %}",
    *(GROW.replace("GROWING", growing) for growing in (
        "ns.x = ns.x ~ ns.x", "ns.x = ns.x + ns.x", "ns.x = ns.x * 2", "ns.x = [ns.x, ns.x] | join",
        "ns.x = ns.x | replace('a', 'aa')", "ns.x = ns.x.replace('a', 'aa')", "ns.x = 'a'.join(ns.x) + 'a'",
        "ns.x = ns.x.join(['', '', ''])", "ns.x = ns.x | string + ns.x", "ns.x %}{{ ns.x * 2 }}{% endset",
        "ns.x = ns.x | join(ns.x)", "ns.y = ns.y + ns.y", "ns.y = ns.y * 2", "ns.y = (ns.y * 2) | list",
        "ns.x = ns.x | indent(9, true)", "ns.x = ns.x.split('a') | join('aab')")),
    MANY + "{{ s.count('b') }}{% endfor %}", MANY + "{% if 'b' in s %}{% endif %}{% endfor %}",
    MANY + "{% if l == l[:] %}{% endif %}{% endfor %}", MANY + "{% if l is eq(l) %}{% endif %}{% endfor %}",
    MANY + "{% set t = s[1:] %}{% endfor %}", MANY + "{% set t = s[i] ~ s %}{% endfor %}",
    TEXTS + "{{ s.rfind('b' ~ s) }}", TEXTS + "{{ s.strip(s) }}", TEXTS + "{{ s | trim(s) }}",
    TEXTS + "{{ s | list }}", TEXTS + "{{ s | map('upper') | list }}", TEXTS + "{{ s | sort }}",
    TEXTS + "{{ l | map(attribute='0' ~ '.0' * 9999) | list }}",
    "{{ messages | tojson(indent=16) * 9999 }}", "{% autoescape 'a' * 10 ** 9 %}{% endautoescape %}",
], ids=short)
def test_what_grows_without_end_is_stopped(source):
    assert "it takes more than 1,048,576 steps, or makes too much text" in run(source)


@pytest.mark.parametrize("source, words", [
    ("{{ 10 ** 10 ** 10 }}", "more than 64 bits"),
    ("{{ 2 ** 65 }}", "power above 64"),
    ("{{ 3 ** 64 }}", "more than 64 bits"),
    ("{{ (2 ** 60) * (2 ** 60) }}", "more than 64 bits"),
    ("{{ ('9' * 4000) | int }}", "more than 64 bits"),
    ("{{ 1" + "0" * 4000 + " }}", "more than 64 bits"),
    ("{{ '%1000000000d' % 1 }}", "formats text"),
    ("{{ '%1000000000d' is odd }}", "odd that is no number"),
    ("{{ '%1000000000d' is divisibleby 3 }}", "divisibleby that is no number"),
    ("{{ '%1000000000d' | format(1) }}", "No filter named 'format'"),
    ("{{ '{:>1000000000}'.format(1) }}", "calls format"),
    ("{{ '{x:>1000000000}'.format_map({'x': 1}) }}", "calls format_map"),
    ("{{ 'a'.center(10 ** 9) }}", "calls str.center"),
    ("{{ 'a'.ljust(10 ** 9) }}", "calls str.ljust"),
    ("{{ 'a'.zfill(10 ** 9) }}", "calls str.zfill"),
    ("{{ '\t'.expandtabs(10 ** 9) }}", "calls str.expandtabs"),
    ("{{ 'a'.encode() }}", "calls str.encode"),
    ("{{ (1).to_bytes(10 ** 9) }}", "calls to_bytes"),
    ("{{ dict.fromkeys('abc') }}", "calls fromkeys"),
    ("{{ 'a' | center(10 ** 9) }}", "No filter named 'center'"),
    ("{{ 'a' | wordwrap(1, wrapstring='b' * 99) }}", "No filter named 'wordwrap'"),
    ("{{ messages | batch(10 ** 9) }}", "No filter named 'batch'"),
    ("{{ {'a': 1} | xmlattr }}", "No filter named 'xmlattr'"),
    ("{{ 'a' | indent(10 ** 9) }}", "indent a number above 64"),
    ("{{ 5 | round(-10 ** 9) }}", "round a number above 64"),
    ("{{ 5 | round(10 ** 9, 'ceil') }}", "round a number above 64"),
    ("{{ messages | tojson(indent=10 ** 6) }}", "indents JSON by more than 16"),
    ("{{ messages | tojson(separators=('a' * 99, ':')) }}", "more than 16"),
    ("{{ lipsum(10 ** 9) }}", "'lipsum' is undefined"),
    ("{{ range(10 ** 9) }}", "Range too big"),
    ("{{ strftime_now('%Y' * 51) }}", "over 100 characters"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ("{% block b %}{{ self.b() }}{% endblock %}", "RecursionError"),
    ("{% for i in 'abc' recursive %}{{ loop(i) }}{% endfor %}", "RecursionError"),
    (NEST + "{% set ns.x = (ns.x,) %}{% endfor %}", "32 levels"),
    (NEST + "{% set ns.x = [ns.x] %}{% endfor %}", "32 levels"),
    (NEST + "{% set ns.x = {'a': ns.x} %}{% endfor %}", "32 levels"),
    (NEST + "{% set ns.x = dict(a=ns.x).items() %}{% endfor %}", "32 levels"),
    (NEST + "{{ m(ns.x) }}{% endfor %}", "32 levels"),
    ("{{ namespace(a=1) }}", "uses a Namespace as if"),
    ("{{ [namespace(a=1)] }}", "uses a Namespace as if"),
    ("{{ namespace(a=1) | string }}", "uses a Namespace as if"),
    ("{% macro m() %}{% endmacro %}{{ m }}", "uses a Macro as if"),
    ("{{ '\\ud801' }}", "not valid Unicode"),
    ("{{ ['x', '\\udfff'] }}", "not valid Unicode"),
    ("{% include 'x' %}", "no loader"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ("{{ messages | map(attribute='__class__.__mro__') | list }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ cycler('a') }}", "'cycler' is undefined"),
    ("x" * 60_001, "60,001 characters, but may have at most 60,000"),
], ids=short)
def test_what_has_no_known_cost_cannot_run(source, words):
    assert words in run(source)


@pytest.mark.parametrize("source, written", [
    ("{{ 'a' ~ 1 ~ none ~ nothing ~ [1] }}", "a1None[1]"),
    ("{{ 7 // 2 }} {{ 7 % 2 }} {{ 2 ** 10 }} {{ 1 / 4 }} {{ -3 + 1 }} {{ 'ab' * 2 }} {{ [1] + [2] }}",
     "3 1 1024 0.25 -2 abab [1, 2]"),
    ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}", "x1"),
    ("{% for k in {'x': 1} %}{{ k }}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}", "x1True1"),
    ("{% for i in range(5) if i is odd %}{{ loop.cycle('a', 'b') }}{{ i }}{% else %}-{% endfor %}", "a1b3"),
    ("{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}", "123"),
    ("{% macro m(a, b='!') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m('x') }}"
     "{% call m('y') %}z{% endcall %}", "x!y!z"),
    ("{% set ns = namespace(n=0) %}{% for m in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
    ("{% set x | trim %} a {% endset %}[{{ x }}]{% filter upper %}b{% endfilter %}", "[a]B"),
    ("{{ ' a b '.strip().split(' ') | join('-') }} {{ 'a,b'.split(',')[-1] }} {{ 'ab'[::-1] }}", "a-b b ba"),
    ("{{ 'ab'.replace('a', 'x') }}{{ 'ab' | replace('b', 'y') }}{{ 'ab'.startswith('a') }}{{ 'b' in 'ab' }}",
     "xbayTrueTrue"),
    ("{{ [3, 1, 1] | sort | unique | map('string') | join(',') }} {{ [1, 2] | map('float') | list }}",
     "1,3 [1.0, 2.0]"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}", "Hi"),
    ("{{ messages | rejectattr('role', 'equalto', 'user') | list | length }} {{ messages | length }}", "0 1"),
    ("{{ nothing | default('d') }}{{ nothing is defined }}{{ tools is none }}{{ messages is string }}",
     "dFalseTrueFalse"),
    ("{{ messages[0] | tojson }} {{ [1, {'é': '<'}] | tojson(indent=2) | length }}",
     '{"role": "user", "content": "Hi"} 29'),
    ("{% if false %}{{ 'a' | wordwrap }}{% endif %}{{ 1 if messages[-1].role == 'user' else 2 }}", "1"),
    ("{% generation %}a{% endgeneration %}{%- generation -%} b {%- endgeneration %}", "ab"),
    ("{{ '<' | e }}{{ '<' | safe }}{{ messages[0].get('x', 'y') }}{{ dict(a=1).a }}", "&lt;<y1"),
], ids=short)
def test_what_templates_are_made_of_works_as_in_jinja(source, written):
    assert run(source) == written


def test_a_runaway_template_is_refused_in_one_line(folder, config):
    write(folder, chat_template__jinja=f"{{% for a in range(99999) %}}{{% for b in range(99999) %}}{CURRENT}"
                                       "{% endfor %}{% endfor %}")
    line = refusal(ChatTokenizer.from_folder(folder, config).encode, CONVERSATIONS["text"])
    assert "the chat template cannot write this conversation: it takes more than 1,048," in line


@pytest.mark.filterwarnings("error")
def test_python_does_not_comment_on_the_code_of_a_template():
    assert run("{{ 1[0] }}{{ 1 is sameas 1 }}{{ 1() if nothing }}") == "True"


def test_nothing_is_computed_while_a_template_is_compiled(folder, config):
    never = "{% if messages | length > 9 %}{{ 'a' * 10 ** 9 }}{{ 9 ** 9 ** 9 }}{% endif %}"
    write(folder, chat_template__jinja=never + "{{ messages[0].content }}")
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.decode(tokenizer.encode([user("Hi")])) == "Hi"


def test_a_long_conversation_is_no_runaway(folder, config):
    write(folder, chat_template__jinja=CURRENT)
    turns = [user("Why? " * 300), {"role": "assistant", "content": "So. " * 300}] * 20 + [user("And?")]
    tokenizer = ChatTokenizer.from_folder(folder, config)
    assert tokenizer.encode(turns, date="today") == theirs(folder, turns, CURRENT, date_string="today")


def test_a_template_may_look_at_each_character():
    template = compile_template("{% for m in messages %}{% for c in m['content'] %}"
                                "{% if c['type'] == 'image' %}!{% endif %}{% endfor %}{% endfor %}"
                                "{{ messages[0].content }}")
    text = "red " * 5000
    meter = Meter(len(text))
    meter.left -= WORK                                              # what is for long conversations alone
    assert render(template, {"messages": [user(text)]}, meter) == text
