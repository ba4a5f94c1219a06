"""Every kind of image becomes an upright RGB image, with the pixels that any viewer shows."""
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from image_helpers import assert_equal, noise, official, png, saved
from PIL import Image, ImageChops, ImageCms, ImageOps

from weights.image_file import open_image
from weights.images import ImageProcessor

LOSSLESS = {"WEBP": {"lossless": True}}


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
    exif[0x0112], exif[0x011A] = 6, 72.0
    block = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")    # a fraction that says text
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(BytesIO(saved(Image.new("RGB", (9, 4)), "JPEG", exif=block))))
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


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1)])
def test_the_smallest_and_the_thinnest_images_go_all_the_way(tmp_path, size):
    path = tmp_path / "strip.png"
    noise(*size).save(path)
    tiles = ImageProcessor(56)([open_image(path)])
    assert tiles.pixels.isfinite().all() and tiles.real.item() == {1: 1, 10000: 4}[max(size)]
    assert_equal(tiles, official(56)(noise(*size), return_tensors="pt"))
