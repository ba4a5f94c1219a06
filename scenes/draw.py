"""Scenes of coloured shapes, and their images.

`make_scene` invents a Scene (a few numbers, no pixels), `draw` turns it into an RGB image for the image
processor, and `scenes.questions` asks about it. The same Scene always gives the same pixels. A checksum of
its content decides whether a scene is for training, validation or testing, so no two splits can share one.
Positions are pixels from the top left corner; rows x columns counts tiles.
"""
import math
import random
import zlib
from colorsys import hsv_to_rgb
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))       # (rows, columns)
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "moon")
COLOURS = {"red": (214, 28, 34), "orange": (250, 134, 14), "yellow": (252, 224, 26), "green": (34, 156, 54),
           "blue": (30, 82, 220), "purple": (116, 34, 168), "pink": (252, 142, 194), "brown": (116, 66, 30),
           "black": (20, 20, 22), "white": (248, 248, 248)}
CHARACTERS = "ABCDEFGHJKLMNPRSTUVXYZ23456789"       # none of O I Q W 0 1, which look alike
SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}    # of checksum % 10
DIRECTIONS = {"horizontal": (0, 1, 0, 1), "vertical": (0, 0, 1, 1), "falling": (0, 0.5, 0.5, 1),
              "rising": (0.5, 1, 0, 0.5)}       # how much of the second colour is in each corner

TILT = 25.0             # degrees: the most that a shape is turned, to either side
MARGIN = 2.0            # free pixels between a shape and the edge; between two shapes twice as many
MIN_GLYPH = 14.0        # pixels; a lower character or digit is hard to read
ZOOM = 2                # shapes are drawn this much larger and then averaged: antialiasing


@dataclass(frozen=True)
class Thing:
    """A shape inside the circle of `radius` around (x, y), turned clockwise by `angle` degrees."""
    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float
    character: str | None
    rgb: Colour             # the colour as drawn, close to COLOURS[colour]


@dataclass(frozen=True)
class Sign:
    """An upright board with a number; (x, y) is its centre."""
    text: str
    x: float
    y: float
    width: float
    height: float
    rgb: Colour


@dataclass(frozen=True)
class Scene:
    """Everything that an image depends on. Width and height are pixels, rows and columns are tiles."""
    rows: int
    columns: int
    width: int
    height: int
    things: tuple[Thing, ...]
    sign: Sign | None
    background: tuple[Colour, Colour]   # a gradient from the first to the second
    direction: str                      # of the gradient: a key of DIRECTIONS
    noise: float                        # share of random pixels mixed in
    noise_seed: int


def make_scene(split: str, index: int, ratio: tuple[int, int] | None = None, tile: int = 112) -> Scene:
    """The scene number `index` of a split. `ratio` is its (rows, columns) of tiles; None: any of the eight.

    Raises ValueError for an unknown split or ratio, a negative index, or a tile too small to draw in.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    if not isinstance(index, int) or index < 0:
        raise ValueError(f"a scene's index counts from 0, so it cannot be {index!r}")
    if ratio is not None and tuple(ratio) not in RATIOS:
        raise ValueError(f"ratio {ratio} is not (rows, columns) of a canvas; choose one of {RATIOS}")
    if tile < 112:
        raise ValueError(f"tile {tile} leaves no room for readable shapes; use at least 112 pixels")
    rng = random.Random(f"scene/{split}/{index}/{ratio}/{tile}")    # a string seeds alike on every platform
    rows, columns = rng.choice(RATIOS) if ratio is None else ratio
    while True:
        scene = _invent(rng, rows, columns, tile)
        if scene is not None and split_of(scene) == split:
            return scene


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to by its content alone: 8 of 10 train, 1 validation, 1 test."""
    share = fingerprint(scene) % 10
    return next(split for split, shares in SPLITS.items() if share in shares)


def fingerprint(scene: Scene) -> int:
    """A checksum of what is where, to the pixel. Background, noise and shades do not change it."""
    things = sorted((t.shape, t.colour, t.character or "", round(t.x), round(t.y)) for t in scene.things)
    return zlib.crc32(repr((scene.rows, scene.columns, things, scene.sign and scene.sign.text)).encode())


def _invent(rng: random.Random, rows: int, columns: int, tile: int) -> Scene | None:
    """One attempt at a scene; None if the shapes found no room."""
    width, height = columns * tile, rows * tile
    if rng.random() < 0.25:         # not below 0.75: four tiles would fit on a canvas of three
        width, height = (round(side * rng.uniform(0.85, 1.0)) for side in (width, height))
    count = rng.randint(1, {1: 3, 2: 4, 3: 5, 4: 6}[rows * columns])
    sign = _invent_sign(rng, width, height, tile) if rng.random() < 0.5 else None
    things, largest = [], tile / 112 * (28 if rows * columns == 1 else 36)
    characters = rng.sample(CHARACTERS, count)
    for (shape, colour), character in zip(_invent_pairs(rng, count), characters, strict=True):
        place = _find_place(rng, things, sign, width, height, largest)
        if place is None:
            return None
        carries = shape not in ("ring", "moon") and rng.random() < 0.55
        rgb = tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in COLOURS[colour])
        angle = round(rng.uniform(-TILT, TILT), 1)
        things.append(Thing(shape, colour, *place, angle, character if carries else None, rgb))
    return Scene(rows, columns, width, height, tuple(things), sign, (_muted(rng), _muted(rng)),
                 rng.choice(tuple(DIRECTIONS)), round(rng.uniform(0.01, 0.12), 3), rng.getrandbits(32))


def _muted(rng: random.Random) -> Colour:
    """A greyish colour of medium brightness: both black and white stand out against it."""
    hue, saturation, value = rng.random(), rng.uniform(0.02, 0.2), rng.uniform(0.5, 0.78)
    return tuple(round(255 * c) for c in hsv_to_rgb(hue, saturation, value))


def _invent_sign(rng: random.Random, width: int, height: int, tile: int) -> Sign:
    text = str(rng.randint(*rng.choice(((10, 99), (100, 999), (100, 999)))))
    digits = rng.uniform(20, 24 if width * height <= tile * tile else 30) * tile / 112
    wide, high = round(digits * (0.84 * len(text) + 0.6), 1), round(digits * 1.5, 1)
    x = rng.uniform(wide / 2 + MARGIN, width - wide / 2 - MARGIN)
    y = rng.uniform(high / 2 + MARGIN, height - high / 2 - MARGIN)
    return Sign(text, round(x, 1), round(y, 1), wide, high, rng.choice(((255, 246, 220), (252, 226, 112))))


def _invent_pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Distinct (shape, colour) pairs. In a third of all scenes some shape or colour occurs more than once."""
    repeats = ("shape", "colour", "both")[:3 if count > 2 else 2]   # two things cannot share both
    repeated = rng.choice(repeats) if count > 1 and rng.random() < 0.42 else ""
    while True:
        shapes = _pick(rng, SHAPES, count, repeated in ("shape", "both"))
        colours = _pick(rng, tuple(COLOURS), count, repeated in ("colour", "both"))
        pairs = list(zip(shapes, colours, strict=True))
        if len(set(pairs)) == count:
            return pairs


def _pick(rng: random.Random, names: tuple[str, ...], count: int, repeated: bool) -> list[str]:
    if not repeated:
        return rng.sample(names, count)
    few = rng.sample(names, rng.randint(1, count - 1))
    return rng.sample(few + rng.choices(few, k=count - len(few)), count)


def _find_place(rng: random.Random, things: list[Thing], sign: Sign | None, width: int, height: int,
                largest: float) -> tuple[float, float, float] | None:
    """(x, y, radius) that touches nothing placed before; None after 60 attempts."""
    for attempt in range(60):
        radius = round(rng.uniform(18.0, max(20.0, largest * (1 - attempt / 60))), 1)
        edge = radius + MARGIN
        x, y = round(rng.uniform(edge, width - edge), 1), round(rng.uniform(edge, height - edge), 1)
        clear = all(math.hypot(x - t.x, y - t.y) >= radius + t.radius + 2 * MARGIN for t in things)
        if clear and (sign is None or _distance(x, y, sign) >= radius + 2 * MARGIN):
            return x, y, radius
    return None


def _distance(x: float, y: float, sign: Sign) -> float:
    """From a point to the nearest point of the board, in pixels."""
    return math.hypot(max(0.0, abs(x - sign.x) - sign.width / 2), max(0.0, abs(y - sign.y) - sign.height / 2))


# ----- pixels


def draw(scene: Scene) -> Image.Image:
    """The image of a scene: RGB, scene.width x scene.height."""
    image = _gradient(scene)
    for thing in scene.things:
        with _enlarged(image, thing.x, thing.y, thing.radius, thing.radius) as (patch, x, y):
            _draw_thing(patch, x, y, thing)
    if (sign := scene.sign) is not None:
        with _enlarged(image, sign.x, sign.y, sign.width / 2, sign.height / 2) as (patch, x, y):
            _draw_sign(patch, x, y, sign)
    noise = random.Random(scene.noise_seed).randbytes(3 * scene.width * scene.height)
    return Image.blend(image, Image.frombytes("RGB", image.size, noise), scene.noise)


@contextmanager
def _enlarged(image: Image.Image, x: float, y: float, wide: float, high: float):
    """A part of the image to draw on, ZOOM times larger, and (x, y) in it. It is averaged back afterwards."""
    left, top = math.floor(x - wide - 1), math.floor(y - high - 1)
    patch = image.crop((left, top, math.ceil(x + wide + 1), math.ceil(y + high + 1)))
    patch = patch.resize((patch.width * ZOOM, patch.height * ZOOM), Image.Resampling.NEAREST)
    yield patch, (x - left) * ZOOM, (y - top) * ZOOM
    image.paste(patch.reduce(ZOOM), (left, top))


def _gradient(scene: Scene) -> Image.Image:
    """The background: a gradient between its four corners."""
    first, last = scene.background
    corners = Image.new("RGB", (2, 2))
    corners.putdata([tuple(round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
                     for share in DIRECTIONS[scene.direction]])
    return corners.resize((scene.width, scene.height), Image.Resampling.BILINEAR,
                          box=(0.5, 0.5, 1.5, 1.5))         # from pixel centre to pixel centre


def _draw_thing(image: Image.Image, x: float, y: float, thing: Thing):
    pen, radius, dark = ImageDraw.Draw(image), thing.radius * ZOOM, tuple(c * 6 // 10 for c in thing.rgb)
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill=thing.rgb, outline=dark, width=ZOOM)
    elif thing.shape == "ring":
        width = round(0.36 * radius)
        pen.ellipse(box, outline=dark, width=width)
        pen.ellipse((box[0] + ZOOM, box[1] + ZOOM, box[2] - ZOOM, box[3] - ZOOM), outline=thing.rgb,
                    width=width - 2 * ZOOM)
    else:
        reach, angle = radius - ZOOM / 2, math.radians(thing.angle)     # half of the outline lies outside
        cos, sin = reach * math.cos(angle), reach * math.sin(angle)
        points = [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in _outline(thing.shape)]
        pen.polygon(points, fill=thing.rgb)
        pen.line(points + points[:1], fill=dark, width=ZOOM)
    if thing.character is not None:
        height = glyph_height(thing) * ZOOM
        bright = 0.299 * thing.rgb[0] + 0.587 * thing.rgb[1] + 0.114 * thing.rgb[2] > 130
        ink = (0, 0, 0) if bright else (255, 255, 255)
        _draw_text(image, thing.character, x, y, height, thing.rgb, halo=ZOOM)     # around the ink
        _draw_text(image, thing.character, x, y, height, ink)


def _draw_sign(image: Image.Image, x: float, y: float, sign: Sign):
    wide, high = sign.width * ZOOM / 2, sign.height * ZOOM / 2
    box = (x - wide, y - high, x + wide - 1, y + high - 1)
    ImageDraw.Draw(image).rectangle(box, fill=sign.rgb, outline=(58, 46, 40), width=2 * ZOOM)
    _draw_text(image, sign.text, x, y, sign.height / 1.5 * ZOOM, (24, 20, 20))


def glyph_height(thing: Thing) -> float:
    """Pixels from foot to head of a thing's character: 1.0 to 1.2 times the radius."""
    share = 1.15 if thing.shape in ("circle", "square") else 1.02
    return max(MIN_GLYPH, share * thing.radius)


def _draw_text(image: Image.Image, text: str, x: float, y: float, height: float, rgb: Colour, halo: int = 0):
    """Text centred on its ink, so that every character is in the middle of its shape."""
    mask = _text_mask(text, round(height), halo)
    image.paste(rgb, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


@lru_cache(maxsize=8192)
def _text_mask(text: str, height: int, halo: int) -> Image.Image:
    """Text with capitals `height` pixels high, as a mask cut to its ink; `halo` makes all strokes thicker."""
    bold = height / 24
    font = _font(round((height - 2 * bold) / 0.716, 1))     # 0.716: a capital's height in the bundled font
    mask = Image.new("L", (round(height * (len(text) + 1)), 2 * height + 8 * halo))
    ImageDraw.Draw(mask).text((mask.width / 2, mask.height / 2), text, 255, font, anchor="mm",
                              stroke_width=bold + halo)
    return mask.crop(mask.getbbox())


@lru_cache(maxsize=512)
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=len(SHAPES))
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape around (0, 0) before it is turned, the farthest at distance 1; y points down."""
    turn = 2 * math.pi
    if shape == "square":
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        points = [(math.sin(turn * i / 3), -math.cos(turn * i / 3)) for i in range(3)]
    elif shape == "star":
        points = [((1, 0.48)[i % 2] * math.sin(turn * i / 10), -(1, 0.48)[i % 2] * math.cos(turn * i / 10))
                  for i in range(10)]
    elif shape == "cross":
        a = 0.36
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a),
                  (-1, -a), (-a, -a)]
    elif shape == "heart":
        points = [(16 * math.sin(t) ** 3, -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t)
                   + math.cos(4 * t) - 2.5) for t in (turn * i / 36 for i in range(36))]
    else:               # moon: a disc without a second disc; 0.17 puts the middle of the rest at (0, 0)
        outer = [0.8495 + (turn - 1.699) * i / 28 for i in range(29)]
        inner = [turn - 1.296 - (turn - 2.592) * i / 20 for i in range(1, 20)]
        points = [(math.cos(t) + 0.17, math.sin(t)) for t in outer]
        points += [(0.45 + 0.78 * math.cos(t) + 0.17, 0.78 * math.sin(t)) for t in inner]
    reach = max(math.hypot(a, b) for a, b in points)
    return tuple((a / reach, b / reach) for a, b in points)
