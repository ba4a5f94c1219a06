"""A path, bytes or a PIL image becomes an upright RGB image: the step before `images.py`.

    path ── bounded read ─► bytes ── FORMATS only ─► PIL image ── over white, upright ─► RGB image

Images come from strangers: a file is a regular file of at most MAX_BYTES, only FORMATS are tried, and an
image whose reading would take more than MAX_MEMORY is refused before it is decoded. Whatever is wrong with
an image is one ValueError of one line, which names the image and says what to do.
"""
import errno
import logging
import math
import os
import re
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from weights.files import regular_file
from weights.messages import named, one_line, reason

# What cameras, screenshots, browsers and scanners produce, as far as Pillow decodes it inside this process:
# it starts no program for any of these, and reads what an ICO contains only as PNG or DIB. All other formats
# are refused. EPS starts Ghostscript; IPTC opens what it contains in any format, EPS too; TGA has no
# signature, so nearly any file can pass for one; each of the rest is one more decoder for a hostile file.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO")
FORMATS_OF_PIL = (None, *FORMATS, "MPO", "DIB")     # made in memory; a JPEG of several images; a bare BMP
SAVE_AS = "save it as PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF, JPEG 2000, PPM or ICO"

# What an image may cost in memory, beside its file. A pixel takes 8 bytes at the peak, decoded and as RGB,
# and more in decoders: 12 for a progressive JPEG, and up to these sizes. To resize, Pillow keeps weights of
# up to 48 bytes for each pixel of both sides, which only matters for strips: 1 x 89000000 would take 4 GB.
# The limit is 178 megapixels in most formats, 119 as WebP, 89 as AVIF and 67 as JPEG 2000.
MAX_MEMORY = 2 ** 31            # bytes
BYTES_PER_PIXEL = {"PPM": 18, "WEBP": 18, "AVIF": 24, "JPEG2000": 32}
BYTES_PER_OTHER_PIXEL = 12
BYTES_PER_SIDE_PIXEL = 48
MAX_BYTES = 2 ** 29             # of a file: enough for 178 megapixels of uncompressed RGB
TOO_MANY_BYTES = f"over {MAX_BYTES // 2 ** 20} MiB; compress it or make it smaller first"
NO_MEMORY = "this machine has too little memory to read it; make it smaller first"

logging.getLogger("PIL").addHandler(logging.NullHandler())      # or its remarks appear on standard error
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,       # what undoes an orientation
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
BAND = 2 ** 15                  # pixels that are converted at once; torch starts no threads for so few


def open_image(source: str | os.PathLike | bytes | bytearray | Image.Image,
               name: str | None = None) -> Image.Image:
    """Read a path, the bytes of a file or a PIL image as RGB: upright, first frame, transparency over white.

    `name` is what messages call it if not by its path. Wide greyscale is scaled to 8 bits, see `_grey_range`.
    A PIL image is decoded if it was only opened, and otherwise left as it is. Raises ValueError with one line
    that names the image and says what to do.
    """
    name = _name(source) if name is None else name
    image = source if isinstance(source, Image.Image) else _open(name, source)
    decode(image, name)
    with _one_line_errors(name):
        turn = TURNS.get(_orientation(image))   # after decoding, in which a TIFF turns itself
        rgb = _to_rgb(image)
        del image                               # so that its memory is free for the turned copy
        return rgb if turn is None else rgb.transpose(turn)


def decode(image: Image.Image, name: str):
    """Decode a PIL image in place if it was only opened. Raises ValueError with one line.

    Its format and size are checked first: to decode an image that was only opened can still start a program.
    """
    width, height = image.size
    if image.format not in FORMATS_OF_PIL:
        raise ValueError(f"{name}: its format, {one_line(image.format, 40)}, is none that is read here; "
                         f"{SAVE_AS}, or pass image.convert('RGB')")
    if width < 1 or height < 1:
        raise ValueError(f"{name}: {width} x {height} pixels, so there is nothing to see; save it again")
    if memory_needed(width, height, image.format) > MAX_MEMORY:
        raise ValueError(f"{name}: {width} x {height} pixels would take over {MAX_MEMORY // 2 ** 30} GiB "
                         "of memory; make it smaller first")
    with _one_line_errors(name), _silent_libtiff(image.format):
        image.load()


def memory_needed(width: int, height: int, kind: str | None) -> int:
    """The bytes that reading and resizing an image of a format of Pillow takes at most, beside its file."""
    per_pixel = BYTES_PER_PIXEL.get(kind, BYTES_PER_OTHER_PIXEL)
    return width * height * per_pixel + (width + height) * BYTES_PER_SIDE_PIXEL


def _name(source: object) -> str:
    """How messages call an image."""
    if isinstance(source, (bytes, bytearray)):
        return "the image's bytes"
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise ValueError(f"an image is a path, bytes or a PIL image, not {type(source).__name__}")
    path = getattr(source, "filename", "") if isinstance(source, Image.Image) else os.fspath(source)
    return named(os.fsdecode(path)) if path else "the image"


# --- from a source to a PIL image ---

NO_IMAGE = (                    # how something else begins, and what to say of it
    (r"data:[\w.+-]*/?[\w.+-]*[;,]",
     "a data URI, where a path or the bytes of a file are expected; decode it first"),
    (r"(https?|ftp|file|s3|gs):/",
     "a URL, where a path or the bytes of a file are expected; download it first"),
    (r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkq|TU0A|AAAA)[\w+/=\s-]{40}",
     "base64 text, where a path or the bytes of a file are expected; decode it first"),
)


def _open(name: str, source: str | os.PathLike | bytes | bytearray) -> Image.Image:
    """The image in a file or in its bytes, not decoded yet."""
    data = source if isinstance(source, (bytes, bytearray)) else _read(name, source)
    if not data:
        raise ValueError(f"{name}: empty; save it again")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: {TOO_MANY_BYTES}")
    if advice := _no_image(bytes(data[:200]).decode("latin-1")):
        raise ValueError(f"{name}: {advice}")
    Image.init()                                # registers Pillow's formats; older ones have no AVIF
    with _one_line_errors(name):
        return Image.open(BytesIO(data), formats=[known for known in FORMATS if known in Image.OPEN])


def _read(name: str, path: str | os.PathLike) -> bytes:
    """The content of a file; one byte more than MAX_BYTES of a larger one."""
    try:
        with regular_file(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise OSError(errno.EFBIG, TOO_MANY_BYTES)
            return file.read(MAX_BYTES + 1)     # some systems give a wrong size, and a file can grow
    except MemoryError:
        raise ValueError(f"{name}: {NO_MEMORY}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {_remedy(os.fsdecode(path), error)}") from None


def _remedy(path: str, error: OSError | ValueError) -> str:
    """Why a path gave no bytes, and what to do about it."""
    match error:
        case OSError(errno=errno.ENOENT | errno.ENAMETOOLONG | errno.ENOTDIR) if advice := _no_image(path):
            return advice
        case FileNotFoundError():
            return "no such file; give the path of an image on this machine"
        case IsADirectoryError():
            return "a folder; name one image inside it"
        case PermissionError():
            return "no permission to read it; change its permissions or copy it"
        case OSError(errno=errno.ENXIO):
            return "a pipe, a socket or a device; save the image as a file and give its path"
        case OSError(errno=errno.EFBIG):
            return TOO_MANY_BYTES
        case OSError():
            return f"cannot be read ({reason(error)}); check the path"
    return f"no possible path ({one_line(error)}); check it"


def _no_image(text: str) -> str | None:
    """What to say of a text that stands for an image in another way, or None."""
    return next((advice for beginning, advice in NO_IMAGE if re.match(beginning, text)), None)


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises while it reads an image into one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # remarks on odd metadata, and on sizes that are allowed here
        try:
            yield
        except Image.DecompressionBombError:
            limit = 2 * Image.MAX_IMAGE_PIXELS
            raise ValueError(f"{name}: over {limit} pixels; make it smaller first") from None
        except UnidentifiedImageError:
            raise ValueError(f"{name}: not an image in a format that is read here; {SAVE_AS}") from None
        except MemoryError:
            raise ValueError(f"{name}: {NO_MEMORY}") from None
        except Exception as error:              # decoders raise nearly anything on damaged data
            raise ValueError(f"{name}: damaged, cut off or of an odd kind ({one_line(error)}); "
                             "save it again as an RGB PNG or JPEG") from None


@contextmanager
def _silent_libtiff(kind: str | None) -> Iterator[None]:
    """Sends standard error nowhere while a TIFF is decoded.

    libtiff writes there, below Python, what Pillow then raises too, and also remarks on images that are fine.
    """
    if kind != "TIFF" or sys.stderr is None:    # None: the program was started with it closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    stderr = os.dup(2)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# --- from a PIL image to RGB ---

def _orientation(image: Image.Image) -> int:
    # Not ImageOps.exif_transpose: it writes the EXIF block anew, and fails on odd tags of no concern here.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1                                # a damaged block says nothing: as stored, as in any viewer


def _to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image as RGB, over white. It is converted in bands: some steps take 40 bytes per pixel."""
    wide = image.mode == "F" or image.mode.startswith("I")
    grey_range = _grey_range(image) if wide else None
    rgb = Image.new("RGB", image.size)
    for top, band in _bands(image):
        if wide:
            band = _to_grey(band, *grey_range)
        if band.has_transparency_data:          # not "A" in getbands(): that is true of LAB
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        rgb.paste(band.convert("RGB"), (0, top))
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image cut into bands of about BAND pixels, each with the row at which it begins."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _values(band: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(band.convert("F").tobytes()), dtype=torch.float32).double()


def _grey_range(image: Image.Image) -> tuple[float, float]:
    """Which values of wide greyscale become black and white.

    White is 65535 in 16 bits, else the first of 1 (float), 255, 65535 that fits. Where some value is negative
    or larger still, the darkest becomes black and the brightest white.
    """
    low, high = math.inf, -math.inf
    for _, band in _bands(image):
        values = _values(band)
        if not values.isfinite().all():
            raise ValueError("some pixels are NaN or infinite")
        low = min(low, values.min().item())
        high = max(high, values.max().item())
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    return next(((0, white) for white in whites if low >= 0 and high <= white), (low, high))


def _to_grey(band: Image.Image, low: float, high: float) -> Image.Image:
    """Wide greyscale as mode L, `low` becoming black and `high` white."""
    values = _values(band)
    grey = ((values - low) * (255 / (high - low or 1))).round()
    transparent = band.info.get("transparency")
    if isinstance(transparent, int):            # the one grey that a PNG declares transparent
        grey[values == transparent] = 255
    data = bytearray(len(grey))
    torch.frombuffer(data, dtype=torch.uint8).copy_(grey)
    return Image.frombytes("L", band.size, bytes(data))
