"""Questions about a scene, with their answers.

`scenes.draw` invents a Scene, `ask` and `questions` ask about it, and training and evaluation pair the texts
with the image. A question is asked only if the scene has one right answer: a name such as "the heart" or
"the red thing" fits exactly one shape, and near ties in position are left out. Answers are short and in lower
case, except for the characters on shapes. The sign is not a shape.

A description reads: ITEM, ITEM and ITEM, and a sign that says NUMBER. An item is "a red heart" or "a red
heart with K". The part about the sign is there if the scene has a sign, and always begins with ", and". The
wording of every text is fixed: the bundled checkpoint was trained on it.
"""
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from scenes.draw import COLOURS, SHAPES, Scene, Thing, fingerprint

LINE_GAP = 5.0          # pixels between a centre and the nearest line of thirds, for `where`
RELATION_GAP = 10.0     # pixels between two centres, for `relation`
ORDER_GAP = 8.0         # pixels between neighbours along the longer side, for `describe`
MAX_DESCRIBED = 4
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def ask(scene: Scene, rng: random.Random, kind: str) -> Question | None:
    """One question of a kind, or None if this scene has no unambiguous one.

    Raises ValueError for an unknown kind.
    """
    if kind not in _ASKERS:
        raise ValueError(f"there are no questions of kind {kind!r}; choose one of {', '.join(KINDS)}")
    made = _ASKERS[kind](scene, rng)
    return None if made is None else Question(kind, *made)


def questions(scene: Scene, seed: int, count: int) -> list[Question]:
    """Up to `count` different questions, the same for the same scene and seed; a description comes last.

    Every kind is asked once before any is asked again; `sign` and `describe` are asked at most once. Fewer
    than `count` are returned if the scene has no more to ask. Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"cannot ask {count} questions; give a count of 0 or more")
    rng = random.Random(f"questions/{seed}/{fingerprint(scene)}")
    asked: dict[str, Question] = {}
    for turn in range(8):
        kinds = sorted(KINDS, key=lambda kind: rng.random() ** (1 / _WEIGHTS[kind]), reverse=True)
        for kind in kinds:
            if len(asked) < count and not (turn and kind in ("sign", "describe")):
                question = ask(scene, rng, kind)
                if question is not None:
                    asked.setdefault(question.text, question)
    return sorted(asked.values(), key=lambda question: question.kind == "describe")     # a stable sort


# ----- one function for each kind: (text, answer), or None


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    found = [(t, f"the {t.shape}") for t in scene.things if _unique(scene, shape=t.shape)]
    found += [(t, f"the thing with {t.character} on it") for t in _readable(scene)]
    if not found:
        return None
    thing, name = rng.choice(found)
    return rng.choice((f"What {_spell(rng)} is {name}?", f"Name the {_spell(rng)} of {name}.")), thing.colour


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    found = []
    for t in scene.things:
        if _unique(scene, colour=t.colour):
            found.append((t, f"Which shape is {t.colour}?"))
            if not _contested(scene, t.colour):
                found.append((t, f"What shape is the {t.colour} thing?"))
    found += [(t, f"What shape is the thing with {t.character} on it?") for t in _readable(scene)]
    if not found:
        return None
    thing, text = rng.choice(found)
    return text, thing.shape


def _character(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    carriers = [t for t in scene.things if t.character is not None]
    if not carriers:
        return None
    thing = rng.choice(carriers)
    names = [f"the {thing.colour} {thing.shape}"]
    names += [f"the {thing.shape}"] * _unique(scene, shape=thing.shape)
    names += [f"the {thing.colour} shape"] * _unique(scene, colour=thing.colour)
    name = rng.choice(names)
    return rng.choice((f"What is written on {name}?", f"Which character is on {name}?")), thing.character


def _count(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes, colours = Counter(t.shape for t in scene.things), Counter(t.colour for t in scene.things)
    by_answer: dict[int, list[str]] = {}
    for number, name in ([(len(scene.things), "shapes")] + [(shapes[s], PLURALS[s]) for s in SHAPES]
                         + [(colours[c], f"{c} shapes") for c in COLOURS]):
        by_answer.setdefault(number, []).append(name)
    answers = sorted(by_answer)
    weights = [{0: 0.1, 1: 0.35}.get(number, 1.0) for number in answers]    # else most answers would be 1
    number = rng.choices(answers, weights)[0]
    name = rng.choice(by_answer[number])
    return rng.choice((f"How many {name} are there?", f"Count the {name}.")), str(number)


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Yes and no are equally likely in each form of question, so the form does not give the answer away."""
    yes = rng.random() < 0.5
    form = rng.choice(("pair", "pair", "pair", "shape", "colour", "sign"))
    if form == "sign" and yes == (scene.sign is not None):
        return rng.choice(("Is there a sign?", "Do you see a sign?")), _yes(yes)
    shapes, colours = {t.shape for t in scene.things}, {t.colour for t in scene.things}
    if form == "shape":
        shape = rng.choice([s for s in SHAPES if (s in shapes) == yes])
        return rng.choice((f"Is there a {shape}?", f"Do you see a {shape}?")), _yes(yes)
    if form == "colour":
        colour = rng.choice([c for c in COLOURS if (c in colours) == yes])
        name = f"{_article(colour)} {colour} shape"
        texts = [f"Is there {name}?"] + [f"Is there anything {colour}?"] * (not _contested(scene, colour))
        return rng.choice(texts), _yes(yes)
    name = _name_pair(*_pair(scene, rng, yes))
    return rng.choice((f"Is there {name}?", f"Do you see {name}?")), _yes(yes)


def _pair(scene: Scene, rng: random.Random, present: bool) -> tuple[str, str]:
    """A (colour, shape) in the image, or one that is not: mostly one thing's colour and another's shape."""
    there = {(t.colour, t.shape) for t in scene.things}
    if present:
        return rng.choice(sorted(there))
    crossed = sorted({(a.colour, b.shape) for a in scene.things for b in scene.things} - there)
    if crossed and rng.random() < 0.8:
        return rng.choice(crossed)
    return rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in there])


def _where(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    found = [t for t in scene.things
             if _clear_of_thirds(t.x, scene.width) and _clear_of_thirds(t.y, scene.height)]
    if not found:
        return None
    thing = rng.choice(found)
    across = ("left", "", "right")[int(3 * thing.x / scene.width)]
    down = ("top", "", "bottom")[int(3 * thing.y / scene.height)]
    name = _name(scene, thing)
    text = rng.choice((f"Where is the {name}?", f"Where do you see the {name}?"))
    return text, f"{down} {across}".strip() or "middle"


def _clear_of_thirds(place: float, side: int) -> bool:
    return all(abs(place - side * line / 3) >= LINE_GAP for line in (1, 2))


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    axis = rng.choice(("x", "y"))
    pairs = [(a, b) for a in scene.things for b in scene.things
             if a is not b and abs(getattr(a, axis) - getattr(b, axis)) >= RELATION_GAP]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    sign, words = rng.choice({"x": ((1, "further left"), (-1, "further right")),
                              "y": ((1, "higher up"), (-1, "lower down"))}[axis])
    a, b = _name(scene, first), _name(scene, second)
    answer = a if sign * (getattr(second, axis) - getattr(first, axis)) > 0 else b
    return rng.choice((f"Which is {words}, the {a} or the {b}?", f"Is the {a} or the {b} {words}?")), answer


def _sign(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if scene.sign is None:
        return None
    text = rng.choice(("What does the sign say?", "Read the sign.", "What number is on the sign?"))
    return text, scene.sign.text


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    axis = "x" if scene.width >= scene.height else "y"
    things = sorted(scene.things, key=lambda t: getattr(t, axis))
    places = [getattr(t, axis) for t in things]
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    if len(things) > MAX_DESCRIBED or min(gaps, default=ORDER_GAP) < ORDER_GAP:
        return None
    items = [_name_pair(t.colour, t.shape) + (f" with {t.character}" if t.character else "") for t in things]
    answer = " and ".join(([", ".join(items[:-1])] if items[:-1] else []) + items[-1:])
    if scene.sign is not None:
        answer += f", and a sign that says {scene.sign.text}"
    return rng.choice(("Describe the picture.", "What do you see?", "What is in the picture?")), answer


_ASKERS = {"colour": _colour, "shape": _shape, "character": _character, "count": _count, "exists": _exists,
           "where": _where, "relation": _relation, "sign": _sign, "describe": _describe}
KINDS = tuple(_ASKERS)
# How early a kind is asked. What many scenes lack is asked first if possible, so that kinds are balanced.
_WEIGHTS = {"colour": 0.9, "shape": 0.9, "character": 1.7, "count": 0.85, "exists": 0.85, "where": 1.2,
            "relation": 1.7, "sign": 3.2, "describe": 1.5}


# ----- names


def _unique(scene: Scene, shape: str | None = None, colour: str | None = None) -> bool:
    """Whether exactly one thing has this shape or this colour."""
    return sum(shape in (None, t.shape) and colour in (None, t.colour) for t in scene.things) == 1


def _name(scene: Scene, thing: Thing) -> str:
    """What to call a thing: its shape if that is unique, else its colour and shape, which always are."""
    return thing.shape if _unique(scene, shape=thing.shape) else f"{thing.colour} {thing.shape}"


def _readable(scene: Scene) -> Iterable[Thing]:
    """Things that can be named by their character: not if the sign shows that digit too."""
    taken = scene.sign.text if scene.sign else ""
    return (t for t in scene.things if t.character and t.character not in taken)


def _contested(scene: Scene, colour: str) -> bool:
    """Whether something that is not a shape may have this colour: the sign, its frame or a character."""
    on_sign = scene.sign is not None and colour in ("yellow", "white", "orange", "brown", "black")
    return on_sign or (colour in ("black", "white") and any(t.character for t in scene.things))


def _name_pair(colour: str, shape: str) -> str:
    return f"{_article(colour)} {colour} {shape}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _spell(rng: random.Random) -> str:
    return rng.choice(("colour", "color"))


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
