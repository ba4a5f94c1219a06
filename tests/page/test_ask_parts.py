"""What can be asked about, and what the page says of the answers."""
import re
from html import unescape

import pytest
from PIL import Image

import page.scene as scenes_of_the_page
from page.answers import FAULT, LINES, about_method, answers_html, figure, refusal_html, said_of, stopped
from page.desk import Asked, Said, Word
from page.scene import EXAMPLES, FOLDER, OF_ANY_IMAGE, example, new_scene, shown, uploaded
from pruning import METHODS
from scenes.draw import make_scene, split_of
from scenes.questions import KINDS

README = (FOLDER.parent / "README.md").read_text(encoding="utf-8")

# ----- subjects


def test_all_examples_are_there_each_with_its_question():
    for index, (name, question) in enumerate(EXAMPLES.items()):
        subject = example(index)
        assert subject.image.mode == "RGB"
        assert (subject.name, subject.first) == (f"examples/{name}", question.text)
        assert {*subject.questions} == {*KINDS} and subject.right(question.text) == question.answer != ""
        assert {subject.right(text) for text in OF_ANY_IMAGE.values()} <= {None, question.answer}
        row = f"| [examples/{name}](examples/{name}) | {question.text} | {question.answer} |"
        assert row in README
    assert [*OF_ANY_IMAGE] == [*KINDS]


@pytest.mark.parametrize("index", range(12))
def test_a_scene_knows_the_right_answers(index):
    subject = new_scene(index)
    assert split_of(make_scene("test", index)) == "test" and subject.name.startswith(f"scene {index} ")
    asked = [question for several in subject.questions.values() for question in several]
    assert subject.first in [question.text for question in asked] and len(asked) >= 8
    for question in asked:
        assert subject.right(f" {question.text} ") == question.answer != ""
    assert subject.right("What colour is the sky?") is None
    for kind, several in subject.questions.items():
        texts = [question.text for question in several]
        assert subject.question(kind) in texts
        assert {subject.question(kind, texts[0]) for _ in range(9)} <= {*(texts[1:] or texts)}
    with pytest.raises(ValueError, match="no question of kind 'weather'"):
        subject.question("weather")


def test_new_scenes_differ():
    assert len({new_scene().name for _ in range(4)}) > 1


def test_questions_about_a_scene_are_never_two_with_one_text():
    for index in range(12):
        texts = [question.text for several in new_scene(index).questions.values() for question in several]
        assert len(texts) == len(set(texts))


def test_an_uploaded_file_is_called_by_its_name_alone(tmp_path):
    Image.new("RGBA", (5, 4)).save(tmp_path / "mine.png")
    subject = uploaded(str(tmp_path / "mine.png"))
    assert (subject.name, subject.image.mode, subject.image.size) == ("mine.png", "RGB", (5, 4))
    (tmp_path / "notes.txt").write_text("a red star\n")
    with pytest.raises(ValueError, match=r"^notes\.txt: not an image"):
        uploaded(str(tmp_path / "notes.txt"))


def test_the_folder_of_the_examples_does_not_depend_on_where_it_is_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (FOLDER / "shapes.png").is_file() and example(0).image.size[0] > 0
    assert scenes_of_the_page.FOLDER.is_absolute()


@pytest.mark.parametrize(("size", "expected"), [
    ((4000, 1000), (1024, 256)), ((1, 3000), (1, 1024)), ((500, 300), (500, 300)), ((112, 56), (448, 224)),
    ((10, 10), (40, 40)), ((1, 1), (4, 4))])
def test_images_are_shown_in_a_size_for_the_screen(size, expected):
    assert shown(Image.new("RGB", size)).size == expected


# ----- answers


def said(text: str, kept: list[float], stored: int = 100) -> Said:
    figures = {"image_tokens": {"slots": 400, "real": 200, "kept": round(sum(kept) / len(kept))},
               "kept_by_layer": kept, "image_kv_bytes": 100, "image_kv_stored_bytes": stored,
               "ms": {"encode": 1.25, "prefill": 20.0, "decode": 3.0}, "tokens_per_second": 7.5}
    return Said([Word(1, text)], figures)


def about(full: Said | None, pruned: Said | None, doing: str = "", question: str = "Why?") -> Asked:
    return Asked(Image.new("RGB", (9, 9)), question, "fastv", 0.25, full=full, pruned=pruned, doing=doing)


def words(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_every_figure_stands_in_its_cell_as_it_is():
    asked = about(said("yes", [200, 200]), said("no", [200, 50], stored=3000))
    html = answers_html(asked)
    for side, one in ("full", asked.full), ("pruned", asked.pruned):
        assert re.search(rf'id="{side}-answer">{one.text}<', html)
        for _, path, _ in LINES:
            found = re.search(rf'id="{side}-{path.replace(".", "-")}" data-value="([^"]+)"', html)
            assert float(found[1]) == figure(one.figures, path)
    assert "125 of 200; by layer 200 50" in words(html) and "100 B of 3 kB stored" in words(html)
    assert "fastv, keep 0.25" in words(html)


@pytest.mark.parametrize(("full", "pruned", "right", "expected"), [
    ("yes", "yes", None, "Both answers are the same."),
    ("yes", "no", None, "The answers differ."),
    ("yes", "yes", "yes", "Both answers are the same. Right."),
    ("yes", "yes", "no", "Both answers are the same. It is not right: no."),
    ("yes", "no", "yes", "The answers differ. Right is yes: only the answer with all image tokens."),
    ("no", "yes", "yes", "The answers differ. Right is yes: only the answer with fewer image tokens."),
    ("a", "b", "c", "The answers differ. Neither is right: c."),
])
def test_the_verdict(full, pruned, right, expected):
    html = answers_html(about(said(full, [9]), said(pruned, [3])), right)
    assert words(re.search(r'<p class="verdict".*?</p>', html)[0]) == expected


def test_while_it_is_answered_there_is_no_verdict():
    html = answers_html(about(Said([Word(1, "a st")]), None, doing="answering"), right="a star")
    assert "verdict" not in html and "a star" not in html and "data-value" not in html
    assert words(html).endswith("answering") and ">a st<" in html
    assert words(stopped(html)).endswith("stopped") and stopped(html).count("stopped") == 1
    done = answers_html(about(said("yes", [9]), said("yes", [9])))
    assert stopped(done) == done and stopped(None) == ""


def test_nothing_that_people_or_models_write_becomes_html():
    bad = "<img src=x onerror=alert(1)>"
    asked = about(said(bad, [9]), said("", [9]), doing=bad, question=bad)
    html = answers_html(asked, right=bad) + refusal_html(bad)
    assert "<img" not in html and html.count("&lt;img") >= 5 and "(nothing)" in html


def test_what_is_wrong_is_said_in_words_and_faults_of_ours_are_on_stderr(capsys):
    assert said_of(ValueError("the question is empty")) == "the question is empty"
    assert "out of memory" in said_of(RuntimeError("CUDA out of memory"))
    assert capsys.readouterr().err == ""
    assert said_of(KeyError("kept")) == FAULT
    assert "KeyError: 'kept'" in capsys.readouterr().err


def test_every_method_is_described_in_a_line_and_has_a_head():
    for method in METHODS:
        about = about_method(method)
        assert 10 < len(about.split(". ")[0]) < 150 and METHODS[method].paper in about and "\n" not in about
        assert words(answers_html(Asked(Image.new("RGB", (9, 9)), "Why?", method, 0.5))).count(method) == 1
