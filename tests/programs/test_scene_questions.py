"""The questions of the built-in world: every answer is true, and no answer can be guessed.

The answers are recomputed here from the texts of the questions and the Scene, by other code than asked them.
"""
import random
import re
from collections import Counter, defaultdict

import pytest
from scene_helpers import ASKED, SCENES, scene_of, thing

from scenes.draw import COLOURS, SHAPES, Scene, Sign, Thing
from scenes.questions import KINDS, PLURALS, Question, ask, questions


def matching(scene: Scene, words: str) -> list[Thing]:
    """The things that a phrase such as "red heart", "blue shape" or "thing with K on it" can mean."""
    words = words.removeprefix("the ")
    if found := re.fullmatch("thing with (.) on it", words):
        return [t for t in scene.things if t.character == found[1]]
    wanted = [word for word in words.split() if word not in ("shape", "thing")]
    assert wanted and all(word in SHAPES or word in COLOURS for word in wanted), words
    return [t for t in scene.things if all(word in (t.shape, t.colour) for word in wanted)]


def the_one(scene: Scene, words: str) -> Thing:
    found = matching(scene, words)
    assert len(found) == 1, (words, scene.things)
    return found[0]


def check_colour(scene: Scene, q: Question):
    words = re.fullmatch(r"(?:What colou?r is|Name the colou?r of) (the .+)[?.]", q.text)[1]
    assert not set(words.split()) & set(COLOURS)
    assert q.answer == the_one(scene, words).colour


def check_shape(scene: Scene, q: Question):
    words = re.fullmatch(r"(?:Which shape is (.+)|What shape is (the thing .+|the .+ thing))\?", q.text)
    words = words[1] or words[2]
    assert not set(words.split()) & set(SHAPES)
    assert q.answer == the_one(scene, words).shape


def check_character(scene: Scene, q: Question):
    words = re.fullmatch(r"(?:What is written on|Which character is on) (the .+)\?", q.text)[1]
    assert q.answer == the_one(scene, words).character


def check_count(scene: Scene, q: Question):
    words = re.fullmatch(r"(?:How many (.+) are there\?|Count the (.+)\.)", q.text)
    words = words[1] or words[2]
    single = {plural: shape for shape, plural in PLURALS.items()}.get(words, words.removesuffix("s"))
    assert q.answer == str(len(scene.things if words == "shapes" else matching(scene, single)))


def check_exists(scene: Scene, q: Question):
    words = re.fullmatch(r"(?:Is there|Do you see) (?:an?|anything) (.+)\?", q.text)[1]
    there = scene.sign is not None if words == "sign" else bool(matching(scene, words))
    assert q.answer == ("yes" if there else "no")


def check_where(scene: Scene, q: Question):
    t = the_one(scene, re.fullmatch(r"Where (?:is|do you see) (the .+)\?", q.text)[1])
    across, down = t.x / scene.width, t.y / scene.height
    words = ["top"] * (down < 1 / 3) + ["bottom"] * (down > 2 / 3) + ["left"] * (across < 1 / 3)
    words += ["right"] * (across > 2 / 3)
    assert q.answer == (" ".join(words) or "middle")
    for place, side in (t.x, scene.width), (t.y, scene.height):
        assert min(abs(place - side / 3), abs(place - 2 * side / 3)) >= 5


def check_relation(scene: Scene, q: Question):
    if found := re.fullmatch(r"Which is (.+), the (.+) or the (.+)\?", q.text):
        direction, *names = found.groups()
    else:
        *names, direction = re.fullmatch(r"Is the (.+) or the (.+) (\w+ \w+)\?", q.text).groups()
    key = {"further left": lambda t: t.x, "further right": lambda t: -t.x, "higher up": lambda t: t.y,
           "lower down": lambda t: -t.y}[direction]
    places = {name: key(the_one(scene, name)) for name in names}
    assert abs(places[names[0]] - places[names[1]]) >= 10
    assert q.answer == min(places, key=places.get)
    for name in names:
        assert len(name.split()) == (1 if len(matching(scene, name.split()[-1])) == 1 else 2)


def check_sign(scene: Scene, q: Question):
    assert q.text in ("What does the sign say?", "Read the sign.", "What number is on the sign?")
    assert q.answer == scene.sign.text


def check_describe(scene: Scene, q: Question):
    shapes, _, number = q.answer.partition(", and a sign that says ")
    assert number == (scene.sign.text if scene.sign else "")
    items = [re.fullmatch("(an?) (.+?) (.+?)(?: with (.))?", item).groups()
             for item in re.split(", | and ", shapes)]
    assert shapes.count(" and ") == (len(items) > 1)
    assert all(article == ("an" if colour[0] == "o" else "a") for article, colour, _, _ in items)
    axis = (lambda t: t.x) if scene.width >= scene.height else (lambda t: t.y)
    ordered = sorted(scene.things, key=axis)
    assert [item[1:] for item in items] == [(t.colour, t.shape, t.character) for t in ordered]
    assert len(items) <= 4 and all(axis(b) - axis(a) >= 8 for a, b in zip(ordered, ordered[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_true(kind):
    check = globals()[f"check_{kind}"]
    asked = [(scene, q) for scene, q in ASKED if q.kind == kind]
    assert len(asked) > 150
    for scene, question in asked:
        check(scene, question)
    phrasings = {re.sub("|".join([*SHAPES, *COLOURS]), "_", q.text) for _, q in asked}
    assert len(phrasings) >= 2


def test_kinds_are_roughly_balanced():
    kinds = Counter(q.kind for seed, scene in enumerate(SCENES) for q in questions(scene, seed, 4))
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) < 2 * min(kinds.values())


def test_no_trivial_answer_dominates():
    answers = defaultdict(Counter)
    for _, question in ASKED:
        answers[question.kind][question.answer] += 1
    yes, no = answers["exists"]["yes"], answers["exists"]["no"]
    assert 0.42 < yes / (yes + no) < 0.58 and set(answers["exists"]) == {"yes", "no"}
    assert max(answers["count"].values()) < 0.45 * answers["count"].total()
    assert answers["count"]["0"] < 0.2 * answers["count"].total()
    assert max(answers["where"].values()) < 0.3 * answers["where"].total() and len(answers["where"]) == 9
    assert set(answers["colour"]) == set(COLOURS) and set(answers["shape"]) == set(SHAPES)


def test_most_refused_pairs_mix_what_is_there():
    crossed = possible = 0
    for scene, q in ASKED:
        found = re.fullmatch(rf".* an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\?", q.text)
        if q.kind == "exists" and q.answer == "no" and found and len(scene.things) > 1:
            colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
            if len(colours) * len(shapes) > len(scene.things):
                possible += 1
                crossed += found[1] in colours and found[2] in shapes
    assert possible > 50 and crossed / possible > 0.5


def test_ambiguous_questions_are_not_asked():
    twins = scene_of(thing("heart", "red", 20, 50), thing("heart", "blue", 24, 80))
    for seed in range(40):
        rng = random.Random(seed)
        assert ask(twins, rng, "colour") is None and ask(twins, rng, "character") is None
        assert ask(twins, rng, "sign") is None
        assert ask(twins, rng, "describe") is None      # their centres are 4 px apart
        relation = ask(twins, rng, "relation")
        assert relation is None or relation.answer in ("red heart", "blue heart")
    board = Sign("47", 80, 90, 45.0, 28.0, (255, 246, 220))
    marked = scene_of(thing("heart", "yellow", 20, 20, "4"), thing("heart", "red", 60, 20), sign=board)
    kinds = "shape", "exists"
    texts = {ask(marked, random.Random(seed), kind).text for seed in range(60) for kind in kinds}
    for doubtful in "with 4", "yellow thing", "anything yellow":
        assert not any(doubtful in text for text in texts)
    assert "Which shape is yellow?" in texts and "Is there a sign?" in texts
    assert ask(scene_of(thing("star", "red", 112 / 3 + 3, 56)), random.Random(0), "where") is None


def test_a_description_reads_from_left_or_from_above():
    board = Sign("472", 56, 180, 60.0, 28.0, (255, 246, 220))
    heart, star = thing("heart", "orange", 30, 30, "K"), thing("star", "blue", 90, 60)
    things = thing("ring", "white", 20, 90), heart, star
    tall, wide = scene_of(*things, sign=board, rows=2), scene_of(*things)
    assert ask(tall, random.Random(1), "describe").answer == \
        "an orange heart with K, a blue star and a white ring, and a sign that says 472"
    assert ask(wide, random.Random(1), "describe").answer == \
        "a white ring, an orange heart with K and a blue star"


def test_questions_are_distinct_repeat_and_end_with_the_description():
    scene = next(s for s in SCENES
                 if len(s.things) == 3 and s.sign and questions(s, 0, 9)[-1].kind == "describe")
    asked = questions(scene, 7, 12)
    assert asked == questions(scene, 7, 12) and asked != questions(scene, 8, 12)
    assert len({q.text for q in asked}) == len(asked) == 12
    assert [q.kind for q in asked].count("describe") == 1 and asked[-1].kind == "describe"
    assert [q.kind for q in asked].count("sign") == 1
    assert questions(scene, 7, 0) == [] and len(questions(scene, 7, 1)) == 1


def test_odd_questions_are_refused_in_one_line():
    for call in (lambda: ask(SCENES[0], random.Random(0), "smell"), lambda: questions(SCENES[0], 0, -1)):
        with pytest.raises(ValueError) as caught:
            call()
        assert "\n" not in str(caught.value)
