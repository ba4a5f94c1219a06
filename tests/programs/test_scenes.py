"""The built-in world: scenes repeat and keep to their split, shapes have room, every answer is true.

The answers are recomputed here from the texts of the questions and the Scene, by other code than asked them.
"""
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import pytest
from PIL import ImageChops

from scenes.draw import (
    CHARACTERS,
    COLOURS,
    MIN_GLYPH,
    RATIOS,
    SHAPES,
    SPLITS,
    Scene,
    Sign,
    Thing,
    draw,
    fingerprint,
    glyph_height,
    make_scene,
    split_of,
)
from scenes.questions import KINDS, PLURALS, Question, ask, questions

SCENES = [make_scene("train", index, ratio) for index, ratio in product(range(60), RATIOS)]
ASKED = [(scene, question) for seed, scene in enumerate(SCENES) for question in questions(scene, seed, 9)]


def thing(shape: str, colour: str, x: float, y: float, character: str | None = None) -> Thing:
    return Thing(shape, colour, x, y, 14.0, 0.0, character, COLOURS[colour])


def scene_of(*things: Thing, sign: Sign | None = None, rows: int = 1, columns: int = 1) -> Scene:
    plain = (120, 130, 140), (120, 130, 140)
    return Scene(rows, columns, 112 * columns, 112 * rows, things, sign, plain, "vertical", 0.0, 1)


# ----- scenes


def test_a_scene_and_its_image_are_always_the_same():
    for index in range(8):
        scene = make_scene("test", index)
        assert scene == make_scene("test", index)
        assert draw(scene).tobytes() == draw(scene).tobytes()
        assert scene != make_scene("test", index + 1)
    assert make_scene("train", 3).rows * make_scene("train", 3).columns in (1, 2, 3, 4)


def test_scenes_are_the_same_on_every_machine():
    """Pinned: a change here makes every published number refer to other images."""
    assert [fingerprint(make_scene(split, 0)) for split in SPLITS] == [2664000525, 1165504558, 1578350789]


def test_splits_never_share_a_scene():
    drawn = {split: {fingerprint(make_scene(split, i, (1, 1))) for i in range(100)} for split in SPLITS}
    for split, prints in drawn.items():
        assert {print_ % 10 for print_ in prints} <= set(SPLITS[split])
    assert not drawn["train"] & drawn["validation"] and not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    assert sorted(share for shares in SPLITS.values() for share in shares) == list(range(10))


def test_the_split_hangs_on_the_content_alone():
    scene = make_scene("validation", 5)
    restyled = replace(scene, background=((1, 2, 3), (4, 5, 6)), noise=0.0, noise_seed=9, direction="rising",
                       things=scene.things[::-1])
    assert split_of(restyled) == split_of(scene) == "validation"
    first, rest = scene.things[0], scene.things[1:]
    for other in replace(first, x=first.x + 1.5), replace(first, shape="disc"), replace(first, character="%"):
        assert fingerprint(replace(scene, things=(other, *rest))) != fingerprint(scene)


def test_every_shape_has_its_room():
    for scene in SCENES:
        for t in scene.things:
            assert t.radius + 1 <= t.x <= scene.width - t.radius - 1
            assert t.radius + 1 <= t.y <= scene.height - t.radius - 1
            assert 18 <= t.radius <= (28 if scene.rows * scene.columns == 1 else 36)
        for a, b in product(scene.things, repeat=2):
            assert a is b or math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 2
        if sign := scene.sign:
            assert sign.width / 2 <= sign.x <= scene.width - sign.width / 2
            assert sign.height / 2 <= sign.y <= scene.height - sign.height / 2
            for t in scene.things:
                x = min(max(t.x, sign.x - sign.width / 2), sign.x + sign.width / 2)
                y = min(max(t.y, sign.y - sign.height / 2), sign.y + sign.height / 2)
                assert math.hypot(t.x - x, t.y - y) > t.radius + 2


def test_things_are_what_they_should_be():
    for scene in SCENES:
        most = {1: 3, 2: 4, 3: 5, 4: 6}[scene.rows * scene.columns]
        assert 1 <= len(scene.things) <= most
        assert len({(t.colour, t.shape) for t in scene.things}) == len(scene.things)
        for t in scene.things:
            assert t.shape in SHAPES and t.colour in COLOURS
            assert t.character is None or (t.character in CHARACTERS and t.shape not in ("ring", "moon"))
            assert glyph_height(t) >= MIN_GLYPH
        assert scene.sign is None or re.fullmatch("[1-9][0-9]{1,2}", scene.sign.text)
    assert 0.35 < sum(scene.sign is not None for scene in SCENES) / len(SCENES) < 0.65
    repeats = sum(len(s.things) > min(len({t.shape for t in s.things}), len({t.colour for t in s.things}))
                  for s in SCENES)
    assert 0.2 < repeats / len(SCENES) < 0.5
    bearers = [t for s in SCENES for t in s.things if t.shape not in ("ring", "moon")]
    assert 0.45 < sum(t.character is not None for t in bearers) / len(bearers) < 0.65


def test_a_shrunk_image_still_fits_its_canvas_best():
    """The rule of the image processor: the smallest enlargement that fills a canvas, then the least tiles."""
    shrunk = 0
    for scene in SCENES:
        scales = {(r, c): min(112 * c / scene.width, 112 * r / scene.height) for r, c in RATIOS}
        least = min(scale for scale in scales.values() if scale >= 1)
        best = min((r * c, (r, c)) for (r, c), scale in scales.items() if scale == least)
        assert best[1] == (scene.rows, scene.columns)
        shrunk += (scene.width, scene.height) != (112 * scene.columns, 112 * scene.rows)
    assert 0.15 < shrunk / len(SCENES) < 0.35


def test_any_ratio_comes_up_and_other_tiles_scale():
    assert {(s.rows, s.columns) for s in (make_scene("train", i) for i in range(80))} == set(RATIOS)
    large = make_scene("train", 0, (2, 1), tile=224)
    assert 0.85 * 448 <= large.height <= 448 and draw(large).size == (large.width, large.height)


@pytest.mark.parametrize("wrong, complaint", [
    (("tests", 0), "no split 'tests'"), (("train", -1), "cannot be -1"), (("train", 1.5), "cannot be 1.5"),
    (("train", 0, (3, 2)), r"ratio \(3, 2\)"), (("train", 0, (1, 1), 56), "tile 56")])
def test_odd_scenes_are_refused_in_one_line(wrong, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        make_scene(*wrong)
    assert "\n" not in str(caught.value)


# ----- images


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_shows_in_its_colour(shape, colour):
    """Most of what is inside the circle is nearest to that colour; outside there is only background."""
    image = draw(scene_of(replace(thing(shape, colour, 56, 56), radius=20.0, angle=33.0)))
    assert image.mode == "RGB" and image.size == (112, 112)
    seen = Counter(image.getpixel((x, y)) for x, y in product(range(112), repeat=2)
                   if math.hypot(x - 55.5, y - 55.5) < 20)
    seen.pop((120, 130, 140), None)
    main = seen.most_common(1)[0][0]
    assert min(COLOURS, key=lambda name: math.dist(main, COLOURS[name])) == colour
    assert all(image.getpixel((x, y)) == (120, 130, 140) for x, y in product(range(112), repeat=2)
               if math.hypot(x - 55.5, y - 55.5) > 21.5)


def test_colours_and_shapes_can_be_told_apart():
    assert min(math.dist(a, b) for a, b in product(COLOURS.values(), repeat=2) if a != b) > 80
    images = {shape: draw(scene_of(thing(shape, "red", 56, 56))).tobytes() for shape in SHAPES}
    assert len(set(images.values())) == len(SHAPES)
    letters = {c: draw(scene_of(thing("circle", "blue", 56, 56, c))).tobytes() for c in CHARACTERS}
    assert len(set(letters.values())) == len(CHARACTERS)


def test_a_character_is_as_high_as_it_says_and_contrasts():
    for colour, ink in ("yellow", (0, 0, 0)), ("blue", (255, 255, 255)):
        lettered = thing("square", colour, 56, 56, "E")
        image = draw(scene_of(replace(lettered, radius=24.0)))
        inked = [[math.dist(image.getpixel((x, y)), ink) < 60 for x in range(40, 72)] for y in range(112)]
        rows = [row for row in inked if any(row)]
        assert abs(len(rows) - glyph_height(replace(lettered, radius=24.0))) <= 2


def test_digits_of_a_sign_are_high_and_stay_on_the_board():
    for scene in [scene for scene in SCENES if scene.sign]:
        text, sign = scene.sign.text, scene.sign
        board = Sign("", sign.x, sign.y, sign.width, sign.height, sign.rgb)
        alone = replace(scene, things=(), noise=0.0)
        digits = ImageChops.difference(draw(alone), draw(replace(alone, sign=board)))
        left, top, right, bottom = digits.convert("L").point(lambda value: 255 * (value > 60)).getbbox()
        assert bottom - top >= 17 and right - left >= 8 * len(text)
        assert left >= sign.x - sign.width / 2 + 2 and right <= sign.x + sign.width / 2 - 2
        assert top >= sign.y - sign.height / 2 + 2 and bottom <= sign.y + sign.height / 2 - 2


def test_noise_and_gradient_change_the_background_only_by_what_the_scene_says():
    plain = scene_of()
    assert draw(plain).getcolors() == [(112 * 112, (120, 130, 140))]
    assert len(draw(replace(plain, noise=0.1)).getcolors(112 * 112)) > 1000
    shaded = draw(replace(plain, background=((100, 100, 100), (200, 200, 200)), direction="horizontal"))
    assert shaded.getpixel((0, 50))[0] < 102 and shaded.getpixel((111, 50))[0] > 198
    assert shaded.getpixel((56, 0)) == shaded.getpixel((56, 111))


# ----- questions


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
