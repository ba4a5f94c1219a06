"""The Learn tab: the rule of the canvas, the drawings, and figures that are those of the answer.

The page is read as XML, which does not forgive a tag that is not closed.
"""
import base64
import io
import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

import generate
from cli.terminal import size
from model.config import VisionConfig
from page.desk import Asked, Desk
from page.drawing import operations, tiles_svg, tokens_svg
from page.learn import EARLY, NOT_YET, STYLE, candidates, canvas_of, reads_of, show
from page.stages import stages
from pruning import METHODS
from weights.image_file import open_image
from weights.images import choose_canvas

RATIOS = VisionConfig.supported_aspect_ratios
EXAMPLES = "shapes", "wide", "tall", "small", "strip"


@pytest.fixture(scope="module")
def desk():
    return Desk(generate.Assistant("tiny"))


@pytest.fixture(scope="module")
def ask(desk):
    def answered(name: str, method: str, keep: float) -> Asked:
        image = open_image(f"examples/{name}.png")
        *_, asked = desk.ask(image, "What is written on the circle?", method, keep)
        return asked
    return answered


@pytest.fixture(scope="module")
def page(desk, ask) -> str:
    return show(desk, ask("wide", "coreset", 0.1))


# ----- the canvas


def test_the_table_of_canvases_says_why():
    """An image of 100 x 150 pixels, height x width, and tiles of 112: by hand."""
    found = {each.grid: (round(each.scale, 3), each.verdict) for each in candidates(100, 150, 112, RATIOS)}
    small = (0.747, "shrinks the image")
    assert found == {(1, 1): small, (2, 1): small, (3, 1): small, (4, 1): small,
                     (1, 2): (1.12, "chosen: it enlarges the image least"),
                     (1, 3): (1.12, "as large, with more tiles"), (1, 4): (1.12, "as large, with more tiles"),
                     (2, 2): (1.493, "enlarges the image more")}


@pytest.mark.parametrize(("sides", "chosen", "verdict"), [
    ((1000, 1000), (2, 2), "chosen: all shrink the image, this one least"),
    ((112, 112), (1, 1), "chosen: the image fits as it is"),
    ((10, 10), (1, 1), "chosen: it enlarges the image least")])
def test_the_chosen_canvas_is_that_of_the_processor(sides, chosen, verdict):
    found, = (each for each in candidates(*sides, 112, RATIOS) if each.chosen)
    assert (found.grid, found.verdict) == (chosen, verdict)
    assert choose_canvas(*sides, 112, RATIOS) == chosen


def test_of_canvases_that_are_alike_the_later_one_says_so():
    found = candidates(1120, 1120, 112, ((1, 2), (2, 1)))
    assert [each.verdict for each in found] == ["chosen: all shrink the image, this one least",
                                                "as large, with as many tiles, but later"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_tiles_are_shown_as_the_model_sees_them(desk, name):
    processor = desk.assistant.processor
    image = open_image(f"examples/{name}.png")
    found = canvas_of(image, processor)
    rows, columns = found.grid
    height, width = found.fitted
    seen = found.pixels.resize((columns * 112, rows * 112), Image.Resampling.NEAREST)
    resized = image.resize((width, height), processor.resample)
    assert seen.crop((0, 0, width, height)).tobytes() == resized.tobytes()
    black = Image.new("RGB", seen.size)
    black.paste(resized)
    assert seen.tobytes() == black.tobytes()
    assert found.grey == "rgb(123, 117, 104)"               # 255 times the mean of the official processor


def test_the_drawing_has_every_tile_its_padding_and_the_unused_slots():
    pixels = Image.new("RGB", (336, 112), "red")
    drawing = ET.fromstring(tiles_svg(pixels, (1, 3), (56, 280), 112, 7, 4, "rgb(1, 2, 3)"))
    kinds = [part.get("class") for part in drawing.iter()]
    assert (kinds.count("tile"), kinds.count("slot"), kinds.count("padding")) == (3, 1, 2)
    margins = [[float(part.get(side)) for side in ("x", "y", "width", "height")] for part in drawing.iter()
               if part.get("class") == "padding"]
    assert margins == [[500, 0, 100, 200], [0, 100, 500, 100]]          # 200 units a tile of 112 pixels
    words = [part.text for part in drawing.iter("text")]
    assert words == ["tile 0", "tile 1", "tile 2", "3"]
    data = next(drawing.iter("image")).get("href").removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == pixels.tobytes()
    full = tiles_svg(pixels, (1, 3), (112, 336), 112, 7, 3, "rgb(1, 2, 3)")
    assert 'class="padding"' not in full and 'class="slot"' not in full


def test_bars_are_as_long_as_the_counts():
    drawing = ET.fromstring(tokens_svg([("slots", 200), ("kept", 50)]))
    assert [float(bar.get("width")) for bar in drawing.iter("rect")] == [180, 45]


@pytest.mark.parametrize(("count", "words"), [
    (0, "none"), (7, "7 FLOP"), (999, "999 FLOP"), (999_600, "1 MFLOP"), (18_530_000_000_000, "18.5 TFLOP"),
    (10 ** 19, "1e+04 PFLOP")])
def test_operations_are_written_for_people(count, words):
    assert operations(count) == words


# ----- the page


def test_before_the_first_question_the_page_says_what_to_do(desk):
    assert show(desk, None) == NOT_YET


def test_the_page_is_well_formed_and_loads_nothing(page):
    body = ET.fromstring(page.removeprefix(STYLE))
    addresses = [part.get(name) for part in body.iter() for name in ("href", "src") if part.get(name)]
    assert all(address.startswith(("#learn-stage-", "data:image/png;base64,")) for address in addresses)
    ids = [part.get("id") for part in body.iter() if part.get("id")]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses if address[0] == "#"} <= set(ids)
    assert not re.search(r"https?:|url\((?!#)|@import|<script", page)


def test_the_page_shows_every_stage_with_both_models_and_its_source(page):
    body = ET.fromstring(page.removeprefix(STYLE))
    sections = {part.get("id"): part for part in body.iter("section")}
    assert {*sections} == {f"learn-stage-{i}" for i in range(1, 9)} | {"learn-total"}
    for name, section in sections.items():
        if name != "learn-total":
            assert [part.text for part in section.iter("th")][4:] == ["this checkpoint", "11B"]
            assert [len(part.text) > 100 for part in section.iterfind(".//pre/code")] == [True, True]
            assert all(re.fullmatch(r"\w+/\w+\.py:\d+", part.text)
                       for part in section.iterfind(".//summary/code"))
    assert page.count('<tr class="chosen">') == 1


def test_only_a_pruned_page_has_arrows(desk, ask, page):
    assert "15 tokens" in page and "150 → 15 tokens" in page and "layer 2 keeps" in page
    for method, keep in ("coreset", 1.0), ("none", 0.5):
        assert "→" not in show(desk, ask("wide", method, keep))


@pytest.mark.parametrize("name", EXAMPLES)
def test_tokens_and_bytes_are_those_of_the_answer(desk, ask, name):
    asked = ask(name, "divprune", 0.25)
    reads = reads_of(desk, asked)
    config = desk.assistant.model.config
    found = stages({"tiny": config}, tuple(asked.encoded.tiles.grid[0].tolist()), 20, reads)
    cache = found[5]
    assert cache.full["tiny"].bytes == asked.full.figures["image_kv_bytes"]
    assert cache.pruned["tiny"].bytes == asked.pruned.figures["image_kv_bytes"]
    assert cache.full["tiny"].count == f"{asked.encoded.real} tokens"


@pytest.mark.parametrize(("method", "projected", "attended", "kept"), [
    ("coreset", (150, 15, 15), (15, 15, 15), (15, 15, 15)),
    ("random", (150, 15, 15), (150, 15, 15), (15, 15, 15)),
    ("elastic_cache", (150, 150, 150), (150, 150, 150), (15, 15, 15)),
    ("visionzip", (15, 15, 15), (15, 15, 15), (15, 15, 15)),
    ("downsample", (50, 50, 50), (50, 50, 50), (50, 50, 50))])
def test_what_layers_read_is_counted(desk, ask, method, projected, attended, kept):
    reads = reads_of(desk, ask("wide", method, 0.1))
    assert (reads.projected, reads.attended, reads.cached) == (projected, attended, kept)
    assert reads.grid == ((1, 1) if method == "downsample" else (1, 3))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page(desk, ask, method):
    body = ET.fromstring(show(desk, ask("small", method, 0.2)).removeprefix(STYLE))
    assert len(body.findall(".//section")) == 9


def test_a_question_that_the_guide_answers_is_shown_unpruned(desk):
    *_, asked = desk.ask(open_image("examples/small.png"), "Do you see a red star?", "sgl", 0.25,
                         {"threshold": 0.01})
    assert asked.pruned.figures["answered_early"] == [0] and reads_of(desk, asked) is None
    assert "→" not in show(desk, asked) and EARLY in show(desk, asked)


def test_the_official_model_stands_alone_when_it_is_the_checkpoint(desk, ask, monkeypatch):
    monkeypatch.setattr("page.learn.ELEVEN", desk.assistant.model.config)
    assert "11B</th>" not in show(desk, ask("small", "coreset", 0.5))


def test_a_pruner_is_written_as_text(desk, ask, monkeypatch):
    asked = ask("small", "coreset", 0.5)
    monkeypatch.setattr(METHODS["coreset"], "__str__", lambda self: "<b>&")
    assert "&lt;b&gt;&amp;" in show(desk, asked)


def test_figures_follow_the_type_of_the_model(desk, page):
    assert size(4 * 3 * 112 * 112 * desk.assistant.model.dtype.itemsize) in page
