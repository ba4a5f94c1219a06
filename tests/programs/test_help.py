"""The pages of --help and --help-all of every program: they fit a terminal, and nothing is missing."""
import re
import shlex
import sys

import pytest
from program_inputs import PROGRAMS, ROOT

import scenes.train
import scenes.train_attention_predictor
import scenes.train_guide
import scenes.train_quecc
from cli.options import Parser, add_model_options
from evaluation import compare
from evaluation.lmms import compare as lmms_compare
from evaluation.lmms import cost, loopback_judge, table
from page import pointing

ALL = {**PROGRAMS, "compare": compare, "train": scenes.train, "train_guide": scenes.train_guide,
       "train_quecc": scenes.train_quecc, "train_attention_predictor": scenes.train_attention_predictor,
       "lmms_compare": lmms_compare, "lmms_cost": cost, "lmms_judge": loopback_judge, "lmms_table": table,
       "pointing": pointing}
HELP = {"--help", "--help-all"}
every_program = pytest.mark.parametrize("name", ALL)


@pytest.fixture
def page(monkeypatch, capsys):
    """A page of help, as a terminal of so many columns gets it."""
    def show(parse, option: str, columns: int = 80) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", "24")
        monkeypatch.setattr(sys, "argv", ["program", option])
        with pytest.raises(SystemExit) as stop:
            parse()
        out, err = capsys.readouterr()
        assert not stop.value.code and err == ""
        return out.splitlines()
    return show


def listed(lines: list[str]) -> set[str]:
    names = [line[:24] for line in lines if line.startswith("  -")]
    return {option for name in names for option in re.findall(r"--[\w-]+", name)}


@pytest.fixture
def options(monkeypatch):
    """All options of a program, from the parser that it makes."""
    def of(name: str) -> set[str]:
        made = []
        monkeypatch.setattr(Parser, "parse_args", lambda parser: made.append(parser))
        ALL[name].arguments()
        monkeypatch.undo()
        return {option for option in made[0]._option_string_actions if option.startswith("--")}
    return of


@every_program
def test_help_fits_the_screen_and_leaves_room_for_the_next_prompt(page, name):
    lines = page(ALL[name].arguments, "--help")
    assert len(lines) <= 23 and max(map(len, lines)) <= 80


@every_program
def test_all_options_are_listed_once_and_help_has_some_of_them(page, options, name):
    expected = options(name)
    common, everything = (page(ALL[name].arguments, option) for option in ("--help", "--help-all"))
    assert max(map(len, everything)) <= 80
    assert listed(everything) == expected and expected >= HELP
    assert listed(common) <= expected - HELP
    assert (common[-1] == "--help-all shows all options.") == (listed(common) != expected - HELP)
    names = [line.split()[0] for line in everything if line.startswith("  --")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("option", sorted(HELP))
@every_program
def test_at_any_width_lines_fit_and_say_the_same_words(page, name, option, columns):
    """Words stay whole, apart from names that are longer than half the screen."""
    def words(lines: list[str]) -> list[str]:
        return " ".join(lines).replace("\\", "").split()

    lines = page(ALL[name].arguments, option, columns)
    wide = [line for line in lines if len(line) > columns]
    assert all(len(line.split()) == 1 for line in wide), wide
    assert words(lines) == words(page(ALL[name].arguments, option, 1000))


def test_the_model_options_are_those_of_all_programs_that_load_one(options):
    parser = Parser("x")
    add_model_options(parser)
    shared = {option for option in parser._option_string_actions if option.startswith("--")}
    assert {"--model", "--revision", "--device", "--dtype"} <= shared
    assert all(shared <= options(name) for name in PROGRAMS)


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_can_be_typed_as_they_stand(page, monkeypatch, name, columns):
    """A shell joins lines at a backslash. Options and files of the examples exist."""
    text = "\n".join(page(ALL[name].arguments, "--help", columns))
    examples = text.partition("examples:\n")[2].replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in examples if line.startswith("  ")]
    assert len(examples) >= 2
    for python, program, *arguments in examples:
        assert python == "python" and (ROOT / program).is_file()
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        args = ALL[name].arguments()
        assert all((ROOT / path).is_file() for path in vars(args).get("image", []))


def test_long_names_and_values_have_a_line_of_their_own(page):
    parser = Parser("x")
    parser.section("here")
    parser.add_argument("--short", metavar="N", help="of a few words")
    parser.add_rare("--an-option-of-many-letters", choices=["one", "two"], help="below it")
    parser.add_rare("--silent", action="store_true")
    common = ["usage: x [options]", "", "  --short N  of a few words", "--help-all shows all options."]
    assert page(parser.parse_args, "--help") == common
    left = " " * 26
    expected = ["usage: x [options]", "", "here:", f"  {'--short N':24}of a few words",
                "  --an-option-of-many-letters one|two", f"{left}below it", "  --silent"]
    assert page(parser.parse_args, "--help-all")[:len(expected)] == expected


def test_no_option_says_nothing_of_more(page):
    parser = Parser("x")
    parser.add_argument("file", metavar="FILE", help="to be read")
    assert page(parser.parse_args, "-h") == ["usage: x [options]", "", "  FILE  to be read"]
