"""Images to tiles: bit for bit as transformers' PIL processor, and no file that ends in a traceback."""
import json
import random
import struct
import warnings
import zlib
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from model.config import VisionConfig
from model.image_tokens import Tiles
from weights.images import ImageProcessor, choose_canvas, fit, open_image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RATIOS = VisionConfig.supported_aspect_ratios
LOSSLESS = {"WEBP": {"lossless": True}}
SIZES_AT_THE_EDGE = [(1, 1), (1, 2), (2, 1), (1, 10000), (10000, 1), (3, 5000), (5000, 3), (7, 7)]


def official(tile: int, **settings) -> MllamaImageProcessorPil:
    values = {"size": {"height": tile, "width": tile}, "image_mean": MEAN, "image_std": STD, "resample": 2}
    return MllamaImageProcessorPil(**values | settings)


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Pixels that no two neighbours share, so that any change of the arithmetic shows."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def assert_equal(tiles: Tiles, expected) -> None:
    """The tiles, their number and the id of their ratio are those of transformers' output for one sample."""
    assert tiles.pixels.dtype == torch.float32 and tiles.grid.dtype == torch.int64
    assert torch.equal(tiles.pixels, expected["pixel_values"][0])
    assert tiles.real.tolist() == expected["num_tiles"][0]
    ids = [VisionConfig().ratio_id(rows, columns) for rows, columns in tiles.grid.tolist()]
    assert ids == expected["aspect_ratio_ids"][0].tolist()


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
    with pytest.raises(ValueError, match="image 2 .*open_picture") as caught:
        ImageProcessor(56)([noise(5, 5), Image.new(mode, size)])
    assert "\n" not in str(caught.value)


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
    (folder / name).write_text(text)
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
    ({"do_pad": False}, "do_pad is False")])
def test_a_broken_or_contradicting_file_is_refused_in_one_line(tmp_path, settings, says):
    with pytest.raises(ValueError) as refusal:
        processor_of(tmp_path, settings)
    message = str(refusal.value)
    assert says in message and "preprocessor_config.json" in message and "\n" not in message


def test_a_grid_list_without_a_grid_small_enough_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"max_image_tiles": 1}')
    with pytest.raises(ValueError, match="max_image_tiles is 1"):
        ImageProcessor.from_folder(tmp_path, VisionConfig(supported_aspect_ratios=((1, 2), (2, 2))))


# --- every kind of image ---

def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """Transparency composited over white in exact arithmetic, to within one step of 8 bits."""
    *colours, alpha = (np.asarray(band, dtype=np.float64) for band in image.convert("RGBA").split())
    mixed = [colour * alpha / 255 + 255 - alpha for colour in colours]
    return Image.merge("RGB", [Image.fromarray(np.round(band).astype(np.uint8)) for band in mixed])


def assert_same(a: Image.Image, b: Image.Image, within: int = 0) -> None:
    assert a.mode == b.mode == "RGB" and a.size == b.size
    assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= within


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "HSV", "CMYK", "YCbCr"])
def test_opaque_modes_give_the_tiles_of_their_rgb_conversion(mode):
    image = noise(40, 90).convert(mode) if mode != "HSV" else noise(40, 90, "HSV")
    opened = open_image(image)
    assert_same(opened, image.convert("RGB"))
    assert_equal(ImageProcessor(56)([opened]), official(56)(image, return_tensors="pt"))


def test_lab_has_a_band_named_a_that_is_not_alpha():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    bands = Image.linear_gradient("L"), Image.new("L", (256, 256), 90), Image.radial_gradient("L")
    colours = Image.blend(Image.merge("RGB", bands), Image.new("RGB", (256, 256), "grey"), 0.5)
    image = ImageCms.profileToProfile(colours, srgb, lab, outputMode="LAB")
    assert_same(open_image(saved(image, "TIFF")), colours, within=12)      # out and back in 8 bits
    assert_same(open_image(image), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_alpha_is_composited_over_white_as_in_transformers(mode):
    image = noise(40, 90, "LA" if mode == "LA" else "RGBA").convert(mode)
    opened = open_image(image)
    assert_same(opened, on_white(image), within=1)
    assert_equal(ImageProcessor(56)([opened]), official(56)(image.convert("RGBA"), return_tensors="pt"))


@pytest.mark.parametrize(("mode", "colour", "transparent", "seen"), [
    ("P", 3, 3, (255, 255, 255)),
    ("P", 3, bytes([255, 255, 255, 0]), (255, 255, 255)),
    ("P", 3, 2, (9, 9, 9)),
    ("L", 77, 77, (255, 255, 255)),
    ("L", 77, 78, (77, 77, 77)),
    ("RGB", (1, 2, 3), (1, 2, 3), (255, 255, 255)),
    ("RGB", (1, 2, 3), (1, 2, 4), (1, 2, 3)),
    ("1", 0, 0, (255, 255, 255))])
def test_a_colour_that_a_png_declares_transparent_becomes_white(mode, colour, transparent, seen):
    image = Image.new(mode, (6, 5), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 5, 5, 5, 7, 7, 7, 9, 9, 9])
    assert open_image(saved(image, "PNG", transparency=transparent)).getcolors() == [(30, seen)]


def test_a_palette_with_alpha_of_its_own_is_composited_too():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 200, 0, 0, 128], "RGBA")
    assert_same(open_image(image), on_white(Image.new("RGBA", (4, 4), (200, 0, 0, 128))), within=1)


def test_animations_show_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    for kind in "gif", "png", "webp", "tiff":
        path = tmp_path / f"animated.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **LOSSLESS.get(kind.upper(), {}))
        with Image.open(path) as image:
            assert image.n_frames == 3
        assert_same(open_image(path), frames[0])


def grey16(values: list[int]) -> Image.Image:
    return Image.frombytes("I;16", (len(values), 1), struct.pack(f"<{len(values)}H", *values))


def greys(image: Image.Image) -> list[int]:
    bands = [list(band.tobytes()) for band in image.split()]
    assert bands[0] == bands[1] == bands[2]
    return bands[0]


def test_sixteen_bits_are_scaled_to_eight_and_not_clipped():
    values = [0, 128, 129, 255, 257, 30000, 65278, 65535]
    expected = [0, 0, 1, 1, 1, 117, 254, 255]                                   # value / 257, rounded
    assert greys(open_image(grey16(values))) == expected
    assert greys(open_image(saved(grey16(values), "PNG"))) == expected
    assert greys(open_image(saved(grey16(values), "TIFF"))) == expected
    big = Image.frombytes("I;16B", (len(values), 1), struct.pack(f">{len(values)}H", *values))
    assert greys(open_image(big)) == expected
    assert greys(open_image(grey16([1000, 65500]))) == [4, 255]               # never stretched
    ladder = grey16([257 * v for v in range(256)])
    assert greys(open_image(ladder)) == list(range(256))                      # what was 8 bits comes back


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
             for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bits_with_a_transparent_value_are_white_there():
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0)), (b"tRNS", struct.pack(">H", 500)),
              (b"IDAT", zlib.compress(b"\0" + struct.pack(">3H", 0, 500, 30000))), (b"IEND", b"")]
    assert greys(open_image(png(chunks))) == [0, 255, 117]


@pytest.mark.parametrize(("mode", "values", "expected"), [
    ("I", [0, 7, 255], [0, 7, 255]),
    ("I", [0, 256, 65535], [0, 1, 255]),
    ("I", [0, 65536, 131072], [0, 128, 255]),
    ("I", [-100, 0, 300], [0, 64, 255]),
    ("I", [70000, 70000, 70000], [0, 0, 0]),
    ("F", [0.0, 0.5, 1.0], [0, 128, 255]),
    ("F", [0.0, 2.4, 254.6], [0, 2, 255]),
    ("F", [0.0, 257.0, 65535.0], [0, 1, 255]),
    ("F", [-1.0, 0.0, 3.0], [0, 64, 255]),
    ("F", [-3e38, 0.0, 3e38], [0, 128, 255])])
def test_wider_greyscale_is_read_by_the_range_it_fills(mode, values, expected):
    packed = struct.pack(f"<3{'i' if mode == 'I' else 'f'}", *values)
    image = Image.frombytes(mode, (3, 1), packed)
    assert greys(open_image(image)) == expected
    assert greys(open_image(saved(image, "TIFF"))) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_obeyed_once(kind, orientation):
    image = Image.merge("RGB", [Image.linear_gradient("L").resize((24, 16))] * 3)
    image.paste("red", (0, 0, 8, 8))      # so that no two turns look the same
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, kind, exif=exif, **LOSSLESS.get(kind, {}))
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    opened = open_image(data)
    assert_same(opened, expected)
    assert opened.size == ((24, 16) if orientation < 5 else (16, 24))
    assert_same(open_image(opened), expected)
    right, low = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    red, green, _ = opened.getpixel((opened.width - 4 if right else 3, opened.height - 4 if low else 3))
    assert red > 200 and green < 60


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0XX\0*\0\0\0\x08",
                                  b"Exif\0\0MM\0*\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_whose_exif_is_damaged_is_shown_as_stored(kind, exif):
    data = saved(Image.new("RGB", (9, 4), "white"), kind, exif=exif)
    assert_same(open_image(data), Image.new("RGB", (9, 4), "white"))


def test_damaged_exif_in_text_and_other_odd_metadata_are_passed_over_in_silence():
    white = (b"IDAT", zlib.compress(b"\0\xff\xff"))
    header, end = (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)), (b"IEND", b"")
    for odd in (b"tEXt", b"Raw profile type exif\0\nexif\n  4\nzzzz"), (b"acTL", struct.pack(">II", 0, 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert greys(open_image(png([header, odd, white, end]))) == [255, 255]
        assert not seen


def test_an_exif_block_that_cannot_be_written_again_does_not_matter():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    block = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x0f\x00\x0c")    # text that says double
    assert open_image(saved(Image.new("RGB", (9, 4)), "JPEG", exif=block)).size == (4, 9)


def test_the_image_given_is_left_as_it_was():
    image = noise(6, 7, "RGBA")
    image.info["note"] = "kept"
    before = image.tobytes()
    open_image(image)
    assert image.mode == "RGBA" and image.tobytes() == before and image.info == {"note": "kept"}
    same = noise(6, 7)
    open_image(same).paste("red", (0, 0, 7, 6))
    assert_same(same, noise(6, 7))


def test_a_path_a_string_bytes_and_an_image_are_the_same_image(tmp_path):
    path = tmp_path / "no suffix at all"
    path.write_bytes(saved(noise(6, 7), "PNG"))
    for source in path, str(path), path.read_bytes(), bytearray(path.read_bytes()), Image.open(path):
        assert_same(open_image(source), noise(6, 7))


# --- what is refused ---

def refusal(source) -> str:
    """The one line with which an image is refused, after which nothing may have been warned of either."""
    with warnings.catch_warnings(record=True) as seen, pytest.raises(ValueError) as caught:
        warnings.simplefilter("always")
        open_image(source)
    message = str(caught.value)
    assert not seen and "\n" not in message and "<_io" not in message and message.isprintable()
    return message


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose data is missing: decoding it would be another error."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(b""))])


def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, monkeypatch):
    missing, empty, text = tmp_path / "missing.png", tmp_path / "empty.png", tmp_path / "text.png"
    empty.write_bytes(b"")
    text.write_text("not an image\n" * 50)
    assert refusal(missing) == f"{missing}: no such file; give the path of an image on this machine"
    assert refusal(tmp_path) == f"{tmp_path}: a folder; name one image inside it"
    assert refusal(empty) == f"{empty}: empty; save it again"
    assert refusal(text) == f"{text}: not an image; give a PNG, JPEG or WebP file"
    assert refusal(f"{text}/x.png").startswith(f"{text}/x.png: ")
    assert refusal("line\nbreak.png").startswith(r"'line\nbreak.png': no such file")
    assert refusal("zero\0byte.png").startswith(r"'zero\x00byte.png': ")
    assert refusal("x" * 5000).startswith("xxx")
    assert refusal(b"") == "the image's bytes: empty; save it again"
    assert refusal(b"GIF89a").startswith("the image's bytes: ")
    assert refusal(7) == "an image is a path, bytes or a PIL image, not int"
    assert refusal(None) == "an image is a path, bytes or a PIL image, not NoneType"

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_bytes", locked)     # root may read every real file
    assert refusal(text) == f"{text}: no permission to read it; change its permissions or copy it"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000"])
def test_truncated_images_are_refused_wherever_they_end(tmp_path, kind):
    whole = saved(noise(64, 64), kind)
    path = tmp_path / "cut.bin"
    for share in 0.02, 0.3, 0.6, 0.9:
        path.write_bytes(whole[:int(len(whole) * share)])
        message = refusal(path)
        assert message.startswith(f"{path}: ") and ("damaged" in message or "not an image" in message)
    assert open_image(whole).size == (64, 64)


def test_random_damage_gives_an_image_or_one_line():
    rng = random.Random(7)
    refused = 0
    for kind in "JPEG", "PNG", "WEBP", "BMP", "GIF", "ICO", "PPM", "TGA":
        whole = saved(noise(20, 24), kind)
        for _ in range(25):
            data = bytearray(whole)
            for _ in range(4):
                data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
            try:
                assert open_image(data).mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 40


def test_a_bomb_is_refused_before_it_is_decoded():
    limit = Image.MAX_IMAGE_PIXELS
    says, filters = f"over {limit} pixels; make it smaller first", list(warnings.filters)
    for width, height in (10000, limit // 10000 + 1), (60000, 60000), (1, 2 ** 31 - 1):
        assert refusal(bomb(width, height)) == f"the image's bytes: {says}"
    assert "damaged" in refusal(bomb(10000, limit // 10000))    # just within the limit: decoded, in vain
    assert limit == Image.MAX_IMAGE_PIXELS and warnings.filters == filters
    inner = bomb(10000, limit // 10000 + 1)
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    assert refusal(icon) == f"the image's bytes: {says}"      # a small image that holds a large one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = Image.open(BytesIO(inner))
    assert refusal(lazy) == f"the image: {says}"


def test_images_of_an_odd_kind_are_refused_in_one_line():
    assert refusal(Image.new("La", (3, 3))).startswith("the image: damaged, cut off or of an odd kind")
    assert "NaN" in refusal(Image.frombytes("F", (2, 1), struct.pack("<2f", 1, float("nan"))))
    assert "infinite" in refusal(Image.frombytes("F", (2, 1), struct.pack("<2f", 1, float("inf"))))
    assert refusal(Image.new("F", (0, 3))) == "the image: not an image; give a PNG, JPEG or WebP file"
    assert refusal(saved(noise(5, 5), "EPS")).startswith("the image's bytes: not an image; give")


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
def test_the_smallest_and_the_thinnest_images_go_all_the_way(tmp_path, size):
    path = tmp_path / "strip.png"
    noise(*size).save(path)
    tiles = ImageProcessor(56)([open_image(path)])
    assert tiles.pixels.isfinite().all() and tiles.real.item() == {1: 1, 10000: 4}[max(size)]
    assert_equal(tiles, official(56)(noise(*size), return_tensors="pt"))
