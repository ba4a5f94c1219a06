"""Images to Tiles: bit for bit as transformers' PIL processor; settings that make no sense are refused."""
import json
import os
import random
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pytest
import torch
from image_helpers import MEAN, STD, assert_equal, noise, official, saved
from PIL import Image

from model.config import VisionConfig
from model.image_tokens import Tiles
from weights.images import ImageProcessor, choose_canvas, fit

RATIOS = VisionConfig.supported_aspect_ratios
SIZES_AT_THE_EDGE = [(1, 1), (1, 2), (2, 1), (1, 10000), (10000, 1), (3, 5000), (5000, 3), (7, 7)]


def sizes(tile: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Random heights and widths, half of them near multiples of the tile where the rules change."""
    rng = random.Random(seed)
    near = [max(1, tile * rng.randint(1, 4) + rng.randint(-2, 2)) for _ in range(count)]
    wild = [int(tile ** rng.uniform(0, 1.4)) for _ in range(count)]
    return [(rng.choice((n, w)), rng.choice((n, w))) for n, w in zip(near, wild, strict=True)]


# --- the same tiles as transformers ---

@pytest.mark.parametrize(("tile", "cases"), [
    (14, sizes(14, 120, 1)),
    (56, sizes(56, 120, 2) + SIZES_AT_THE_EDGE),
    (112, sizes(112, 60, 3)),
    (448, sizes(448, 3, 4) + [(300, 200)]),
    (560, [(1, 3000), (2999, 1), (2000, 3000), (100, 90), (561, 1119)])])
def test_every_size_equals_transformers_bit_for_bit(tile, cases):
    ours, theirs = ImageProcessor(tile), official(tile)
    for seed, (height, width) in enumerate(cases):
        image = noise(height, width, seed=seed)
        assert_equal(ours([image]), theirs(image, return_tensors="pt"))


def test_several_images_at_once_are_as_one_by_one_and_as_transformers():
    images = [noise(h, w, seed=h) for h, w in [(30, 40), (200, 40), (1, 1), (113, 111), (40, 300)]]
    processor = ImageProcessor(56)
    together = processor(images)
    assert_equal(together, official(56)([images], return_tensors="pt"))
    parts = Tiles.cat([processor([image]) for image in images])
    assert torch.equal(together.pixels, parts.pixels) and torch.equal(together.grid, parts.grid)
    assert len(together) == len(parts) == 5


@pytest.mark.parametrize("settings", [
    {"resample": 0}, {"resample": 1}, {"resample": 3}, {"resample": 4}, {"resample": 5},
    {"do_rescale": False}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5}, {"image_mean": [0.5, 0.4, 0.3]}, {"image_std": [0.1, 2.0, 1 / 3]}])
def test_every_setting_of_the_file_is_obeyed_as_in_transformers(tmp_path, settings):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = ImageProcessor.from_folder(tmp_path, VisionConfig(image_size=56))
    image = noise(75, 130)
    assert_equal(processor([image]), official(56, **settings)(image, return_tensors="pt"))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_fewer_tiles_than_the_model_has_leave_the_other_slots_empty(tmp_path, most):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_image_tiles": most}))
    tiles = ImageProcessor.from_folder(tmp_path, VisionConfig(image_size=56))([noise(150, 400)])
    expected = official(56, max_image_tiles=most)(noise(150, 400), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tiles.pixels[:, :most], expected)
    assert tiles.pixels.shape[1] == 4 and not tiles.pixels[:, most:].any()


def test_padding_inside_the_canvas_is_normalised_black_and_empty_slots_are_zero():
    tiles = ImageProcessor(56)([Image.new("RGB", (100, 20), "white")])
    black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert tiles.grid.tolist() == [[1, 2]] and tiles.real.tolist() == [2]
    assert torch.equal(tiles.pixels[0, :2, :, 20:], black[:, None, None].expand(2, 3, 36, 56))
    assert (tiles.pixels[0, 0, :, :20] > 1).all()
    assert not tiles.pixels[0, 2:].any()


def test_no_images_make_tiles_of_no_images():
    tiles = ImageProcessor(56)([])
    assert len(tiles) == 0 and tiles.pixels.shape == (0, 4, 3, 56, 56) and tiles.grid.shape == (0, 2)


def test_moving_tiles_changes_the_type_of_the_pixels_only():
    tiles = ImageProcessor(56)([noise(60, 60)])
    moved = tiles.to("cpu", torch.bfloat16)
    assert moved.pixels.dtype == torch.bfloat16 and moved.grid.dtype == torch.int64
    assert torch.equal(moved.pixels, tiles.pixels.bfloat16()) and torch.equal(moved.grid, tiles.grid)
    assert tiles.pixels.dtype == torch.float32


@pytest.mark.parametrize(("mode", "size"), [("L", (5, 5)), ("RGBA", (5, 5)), ("RGB", (0, 5))])
def test_the_processor_refuses_what_is_not_rgb(mode, size):
    with pytest.raises(ValueError, match="image 2 .*open_image") as caught:
        ImageProcessor(56)([noise(5, 5), Image.new(mode, size)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("images", "says"), [
    (noise(5, 5), "images is of type Image, but must be a list of PIL images"),
    ("x.png", "images is of type str, but must be a list of PIL images"),
    (None, "images is of type NoneType, but must be a list of PIL images"),
    (iter([noise(5, 5)]), "images is of type list_iterator, but must be a list of PIL images"),
    ([noise(5, 5), b"x"], "image 2 is of type bytes; pass what open_image gives"),
    ([None], "image 1 is of type NoneType; pass what open_image gives"),
    ([Image.open(BytesIO(saved(noise(50, 50), "JPEG")[:-90]))], "image 1: damaged, cut off or of an odd "),
    ([Image.open(BytesIO(b"P6 1 50000000 255\n"))], "image 1: 1 x 50000000 pixels would take over 2 GiB")])
def test_the_processor_refuses_what_is_no_list_of_readable_images(images, says):
    with pytest.raises(ValueError) as caught:
        ImageProcessor(56)(images)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_an_image_that_was_only_opened_is_decoded():
    opened = Image.open(BytesIO(saved(noise(5, 6), "PNG")))
    assert torch.equal(ImageProcessor(56)((opened,)).pixels, ImageProcessor(56)([noise(5, 6)]).pixels)


# --- canvas and size ---

def test_the_canvas_is_the_one_of_the_rule():
    """Restated in exact fractions: least enlargement, else least shrinking; then the smaller, the first."""
    rng = random.Random(5)
    for _ in range(3000):
        tile = rng.choice((14, 56, 448, 560))
        height, width = (rng.choice((rng.randint(1, 5 * tile), tile * rng.randint(1, 5))) for _ in "hw")
        ranked = []
        for place, (rows, columns) in enumerate(RATIOS):
            scale = min(Fraction(rows * tile, height), Fraction(columns * tile, width))
            ranked.append(((0, scale) if scale >= 1 else (1, -scale), rows * columns, place))
        assert choose_canvas(height, width, tile, RATIOS) == RATIOS[min(ranked)[2]], (height, width, tile)


def test_a_fitted_image_keeps_its_shape_inside_its_canvas():
    rng = random.Random(6)
    for _ in range(2000):
        height, width, tile = rng.randint(1, 3000), rng.randint(1, 3000), rng.choice((56, 560))
        rows, columns = choose_canvas(height, width, tile, RATIOS)
        new_height, new_width = fit(height, width, (rows, columns), tile)
        assert 1 <= new_height <= rows * tile and 1 <= new_width <= columns * tile
        if min(new_height, new_width) > 1:                              # else a side may be rounded up
            scale = max(new_height / height, new_width / width)
            assert scale <= max(1, tile / max(height, width)) + 1e-9        # enlarged to one tile at most
            assert height * scale - 1 < new_height < height * scale + 1e-6  # rounded down
            assert width * scale - 1 < new_width < width * scale + 1e-6


# --- preprocessor_config.json ---

def processor_of(folder: Path, settings, name: str = "preprocessor_config.json") -> ImageProcessor:
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    return ImageProcessor.from_folder(folder, VisionConfig(image_size=56))


def test_what_the_file_leaves_out_has_the_official_value(tmp_path):
    default = ImageProcessor(tile_size=56, max_tiles=4, canvases=RATIOS, image_mean=MEAN, image_std=STD,
                             rescale_factor=1 / 255, resample=2, do_rescale=True, do_normalize=True)
    assert ImageProcessor.from_folder(tmp_path, VisionConfig(image_size=56)) == default
    for settings in {}, {"image_mean": None, "resample": None}, {"image_processor_type": "x"}:
        assert processor_of(tmp_path, settings) == default


def test_what_transformers_saves_is_read_alone_and_inside_processor_config(tmp_path):
    official(56, image_mean=[0.1, 0.2, 0.3], resample=3).save_pretrained(tmp_path)
    alone = ImageProcessor.from_folder(tmp_path, VisionConfig(image_size=56))
    assert alone.image_mean == (0.1, 0.2, 0.3) and alone.resample == 3
    older = processor_of(tmp_path, {"processor_class": "MllamaProcessor"}, "processor_config.json")
    assert older == alone
    nested = {"image_processor": {"image_mean": [0.4, 0.5, 0.6]}}
    newer = processor_of(tmp_path, nested, "processor_config.json")
    assert newer.image_mean == (0.4, 0.5, 0.6) and newer.resample == 2


@pytest.mark.parametrize(("settings", "says"), [
    ("{", "not readable as JSON"),
    ("", "not readable as JSON"),
    ("[1]", "holds a list"),
    ({"size": {"height": 560, "width": 560}}, "image_size is 56"),
    ({"size": {"height": 56, "width": 112}}, "image_size is 56"),
    ({"size": {"height": 56}}, "image_size is 56"),
    ({"size": {"shortest_edge": 56}}, "image_size is 56"),
    ({"size": 56}, "image_size is 56"),
    ({"max_image_tiles": 5}, "max_image_tiles is 5"),
    ({"max_image_tiles": 0}, "max_image_tiles is 0"),
    ({"max_image_tiles": True}, "max_image_tiles is True"),
    ({"max_image_tiles": "4"}, "max_image_tiles is '4'"),
    ({"image_mean": [0.5, 0.5]}, "image_mean is"),
    ({"image_mean": 0.5}, "image_mean is"),
    ({"image_mean": [0.5, "a", 1]}, "image_mean is"),
    ('{"image_mean": [NaN, 1, 1]}', "image_mean is"),
    ('{"image_mean": [-Infinity, 1, 1]}', "image_mean is"),
    ({"image_std": [1, 0, 1]}, "image_std is"),
    ({"rescale_factor": 0}, "rescale_factor is 0"),
    ({"rescale_factor": 10 ** 400}, "rescale_factor is"),
    ({"rescale_factor": "1/255"}, "rescale_factor is"),
    ({"resample": 9}, "resample is 9"),
    ({"resample": "bilinear"}, "resample is"),
    ({"do_normalize": "yes"}, "do_normalize is"),
    ({"do_resize": False}, "do_resize is False"),
    ({"do_pad": False}, "do_pad is False"),
    ({"image_std": [1e-50, 1, 1]}, "pixels that are not finite"),
    ({"image_std": [1, 1, 1e-39]}, "pixels that are not finite"),
    ({"image_std": [1, -1, 1]}, "image_std is [1, -1, 1], but must be three numbers above 0"),
    ({"rescale_factor": 1e300}, "pixels that are not finite"),
    ({"rescale_factor": 10 ** 40}, "pixels that are not finite"),
    ({"image_mean": [1e38, 0, 0]}, "pixels that are not finite"),
    ({"image_mean": [0, -10 ** 300, 0]}, "pixels that are not finite"),
    ({"image_mean": [0, 0, -3.4e38], "image_std": [1, 1, 1]}, "pixels that are not finite"),   # only in bf16
    ('{"rescale_factor": 1e400}', "rescale_factor is inf, but must be a number above 0"),
    ('{"max_image_tiles": Infinity}', "max_image_tiles is inf, but must be a whole number"),
    ('{"size": {"height": NaN, "width": 56}}', "image_size is 56"),
    ({"image_mean": [10 ** 401, 0, 0]}, "image_mean is [1000"),
    ({"max_image_tiles": 10 ** 401}, "max_image_tiles is 1000"),
    ({"size": 10 ** 401}, "size is 1000"),
    ('{"image_mean": 1' + "0" * 5000 + "}", "not readable as JSON"),
    ('{"image_mean": ' + "[" * 500 + "]" * 500 + "}", "image_mean is [[["),
    ('{"size": ' + '{"height": ' * 500 + "1" + "}" * 501, "size is {'height': {"),
    ('{"resample": "' + "x" * 100_000 + '"}', "resample is 'xxx"),
    ("[" * 100_000, "not readable as JSON"),
    ("\ud83d", "not readable as JSON")])
def test_a_broken_or_contradicting_file_is_refused_in_one_line(tmp_path, settings, says):
    with pytest.raises(ValueError) as refusal:
        processor_of(tmp_path, settings)
    message = str(refusal.value)
    assert says in message and "preprocessor_config.json" in message and "\n" not in message
    assert message.isprintable() and len(message) < 700


def test_settings_of_a_processor_made_by_hand_are_checked_too():
    for settings in {"image_std": (1, 0, 1)}, {"image_mean": (float("nan"), 0, 0)}, {"rescale_factor": 1e300}:
        with pytest.raises(ValueError, match="pixels that are not finite"):
            ImageProcessor(56, **settings)
    assert ImageProcessor(56, rescale_factor=1e300, do_rescale=False)       # unused


def test_settings_that_cannot_be_read_are_not_absent(tmp_path, without_permission):
    vision, large = VisionConfig(image_size=56), tmp_path / "large"
    large.touch()
    os.truncate(large, 2 ** 35)             # sparse: it takes no room
    for name in "preprocessor_config.json", "processor_config.json":
        path = tmp_path / name
        for target, says in ((path, "Too many levels of symbolic links"), (tmp_path / "gone", "No such file"),
                             (tmp_path, "a folder, not a file"), ("/dev/zero", "a pipe, a socket or a "),
                             (large, "over 10 MB")):
            path.symlink_to(target)
            with pytest.raises(ValueError, match=f"{name}: .*{says}"):
                ImageProcessor.from_folder(tmp_path, vision)
            path.unlink()
        os.mkfifo(path)
        with pytest.raises(ValueError, match="a pipe, a socket or a device"):
            ImageProcessor.from_folder(tmp_path, vision)
        path.unlink()
    for folder in tmp_path / "loop", "half \ud800", "zero \0", "x" * 300:
        if folder == tmp_path / "loop":
            folder.symlink_to(folder)
        with pytest.raises(ValueError, match="cannot be read|not the name of a file") as refusal:
            ImageProcessor.from_folder(folder, vision)
        assert str(refusal.value).isprintable() and len(str(refusal.value)) < 700
    with without_permission(tmp_path), pytest.raises(ValueError, match="cannot be read .*Permission denied"):
        ImageProcessor.from_folder(tmp_path, vision)


def test_a_folder_whose_name_is_not_utf_8_is_read(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert processor_of(folder, {"image_mean": [1, 2, 3]}).image_mean == (1, 2, 3)
    with pytest.raises(ValueError, match=r"caf\\udce9/preprocessor_config.json: not readable as JSON"):
        processor_of(folder, "{")


def test_a_grid_list_without_a_grid_small_enough_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"max_image_tiles": 1}')
    with pytest.raises(ValueError, match="max_image_tiles is 1"):
        ImageProcessor.from_folder(tmp_path, VisionConfig(supported_aspect_ratios=((1, 2), (2, 2))))
