"""An image becomes Tiles: the first step of the data flow, image -> Tiles -> `vision.py`.

`open_picture` takes a file, bytes or a PIL image and gives an upright RGB image, or refuses it in one line.
`ImageProcessor` chooses a canvas of 1 to 4 square tiles, resizes the image to fit it, pads it at the bottom
and right, normalises it and cuts it into tiles.

I images, T tile slots, S tile side in pixels. Sizes are (height, width) and grids (rows, columns); PIL says
(width, height). Trap: padding in the canvas is black before normalising, a slot without a tile 0.0 after it.
"""
import json
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from einops import rearrange
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from model.config import VisionConfig
from model.image_tokens import Grid, Tiles


def choose_canvas(height: int, width: int, tile: int, ratios: tuple[Grid, ...]) -> Grid:
    """The grid of tiles for a size in pixels: the one that enlarges it least, else shrinks it least.

    Of grids that scale it equally, the one with the fewest tiles; of those, the first.
    """
    scales = {(rows, columns): min(rows * tile / height, columns * tile / width) for rows, columns in ratios}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((grid for grid in ratios if scales[grid] == best), key=math.prod)


def fit(height: int, width: int, grid: Grid, tile: int) -> tuple[int, int]:
    """The height and width in pixels to give an image, in its own shape, inside a canvas of `grid` tiles.

    A small image grows only until its longer side fills one tile, whatever the canvas.
    """
    room_h, room_w = min(max(height, tile), grid[0] * tile), min(max(width, tile), grid[1] * tile)
    scale_h, scale_w = room_h / height, room_w / width
    if scale_w < scale_h:
        return min(max(math.floor(height * scale_w), 1), room_h), room_w   # a 1 x 10000 strip keeps one pixel
    return room_h, min(max(math.floor(width * scale_h), 1), room_w)


@dataclass(frozen=True)
class ImageProcessor:
    """Turns RGB images into Tiles, bit for bit as the official code; the defaults are its values."""
    tile_size: int
    max_tiles: int = VisionConfig.max_num_tiles             # slots per image, whatever its canvas
    canvases: tuple[Grid, ...] = VisionConfig.supported_aspect_ratios
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BILINEAR
    do_rescale: bool = True
    do_normalize: bool = True

    @classmethod
    def from_folder(cls, folder: str | Path, vision: VisionConfig) -> "ImageProcessor":
        """Read a checkpoint's preprocessing, with the official value for whatever its file leaves out.

        Trap: transformers' class would fill such gaps with 224 pixels and a mean that no Llama had.
        Raises ValueError with one line where the file is broken or contradicts the model.
        """
        path, settings = _read_settings(Path(folder))
        try:
            canvases = _check_settings(settings, vision)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        ours = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
                if name in WANTED and name in cls.__dataclass_fields__}
        return cls(tile_size=vision.image_size, max_tiles=vision.max_num_tiles, canvases=canvases, **ours)

    def __call__(self, images: list[Image.Image]) -> Tiles:
        """Cut RGB images, as `open_picture` gives them, into Tiles; ValueError for any other mode.

        The pixels are [I, T, 3, S, S] float32; no images give Tiles of no images.
        """
        pixels = torch.zeros(len(images), self.max_tiles, 3, self.tile_size, self.tile_size)
        grid = torch.zeros(len(images), 2, dtype=torch.int64)
        for i, image in enumerate(images):
            if image.mode != "RGB" or 0 in image.size:
                raise ValueError(f"image {i + 1} has mode {image.mode} and size {image.size}, "
                                 "so is not an RGB image; pass what open_picture gives")
            rows, columns = choose_canvas(image.height, image.width, self.tile_size, self.canvases)
            canvas = self._normalise(self._draw(image, (rows, columns)))                      # [H, W, 3]
            pixels[i, :rows * columns] = rearrange(canvas, "(r h) (c w) k -> (r c) k h w", r=rows, c=columns)
            grid[i] = torch.tensor((rows, columns))
        return Tiles(pixels, grid)

    def _draw(self, image: Image.Image, grid: Grid) -> Tensor:
        """The resized image in the upper left of a black canvas, [H, W, 3] uint8."""
        height, width = fit(image.height, image.width, grid, self.tile_size)
        canvas = Image.new("RGB", (grid[1] * self.tile_size, grid[0] * self.tile_size))
        canvas.paste(image.resize((width, height), self.resample))
        flat = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
        return flat.view(canvas.height, canvas.width, 3)

    def _normalise(self, canvas: Tensor) -> Tensor:
        # The official order of rounding: a float64 product, then float32 for the rest.
        x = (canvas.double() * self.rescale_factor).float() if self.do_rescale else canvas.float()
        return (x - x.new_tensor(self.image_mean)) / x.new_tensor(self.image_std) if self.do_normalize else x


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9     # nor NaN


def _colour(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_number(v) for v in value)


WANTED = {      # setting: what it must be, in words and as a test
    "image_mean": ("three numbers", _colour),
    "image_std": ("three numbers, none of them 0", lambda v: _colour(v) and all(v)),
    "rescale_factor": ("a number above 0", lambda v: _number(v) and v > 0),
    "resample": ("one of Pillow's filters, 0 to 5", lambda v: type(v) is int and 0 <= v <= 5),
    "max_image_tiles": ("a whole number of at least 1", lambda v: type(v) is int and v >= 1),
    **dict.fromkeys(("do_rescale", "do_normalize"), ("true or false", lambda v: isinstance(v, bool))),
    **dict.fromkeys(("do_resize", "do_pad"), ("true: the model only sees whole tiles", lambda v: v is True)),
}


def _read_settings(folder: Path) -> tuple[Path, dict]:
    """The image settings of a checkpoint and their file; empty where it has none. A null counts as left out.

    transformers 5 saves them in processor_config.json, where they win; others in preprocessor_config.json.
    """
    for name in "processor_config.json", "preprocessor_config.json":
        path = folder / name
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not readable as JSON ({_one_line(error)})") from None
        if name == "processor_config.json" and isinstance(data, dict):
            data = data.get("image_processor") or {}
        if not isinstance(data, dict):
            raise ValueError(f"{path}: holds a {type(data).__name__} where the settings should be")
        if data:
            return path, {key: value for key, value in data.items() if value is not None}
    return folder / "preprocessor_config.json", {}


def _check_settings(settings: dict, vision: VisionConfig) -> tuple[Grid, ...]:
    """The canvases that the settings allow; ValueError where one is unusable or contradicts the model."""
    for name, (wanted, good) in WANTED.items():
        if name in settings and not good(settings[name]):
            raise ValueError(f"{name} is {settings[name]!r}, but must be {wanted}")
    side = vision.image_size
    size = settings.get("size", {"height": side, "width": side})
    if not isinstance(size, dict) or (size.get("height"), size.get("width")) != (side, side):
        raise ValueError(f"size is {size!r}, but config.json's image_size is {side}; use one model's files")
    most = settings.get("max_image_tiles", vision.max_num_tiles)
    canvases = tuple(grid for grid in vision.supported_aspect_ratios if math.prod(grid) <= most)
    if most > vision.max_num_tiles or not canvases:
        raise ValueError(f"max_image_tiles is {most}, but config.json says {vision.max_num_tiles} tiles "
                         f"and grids {vision.supported_aspect_ratios}; use one model's files")
    return canvases


# --- from a file to an upright RGB image ---

TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,       # what undoes an orientation
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def open_image(source: str | os.PathLike | bytes | bytearray | Image.Image) -> Image.Image:
    """Read a path, the bytes of a file or a PIL image as RGB: upright, first frame, transparency over white.

    Wide greyscale is scaled to 8 bits, see `_eight_bits`. Raises ValueError with one line that names the
    image and says what to do; its size is checked before it is decoded.
    """
    name = _name(source)
    data = b"" if isinstance(source, Image.Image) else _read(name, source)
    with _decoding(name):
        image = Image.open(BytesIO(data)) if data else source
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError      # for a PIL image whose owner let it pass
        if image.format == "EPS" or 0 in image.size:
            raise UnidentifiedImageError            # PostScript is a program: Pillow would start Ghostscript
        image.load()                                # first: a TIFF turns itself and drops its orientation
        turn = TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
    rgb.info.clear()                                # an orientation left there would be obeyed a second time
    return rgb if turn is None else rgb.transpose(turn)


def _name(source) -> str:
    if isinstance(source, (bytes, bytearray)):
        return "the image's bytes"
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise ValueError(f"an image is a path, bytes or a PIL image, not {type(source).__name__}")
    path = getattr(source, "filename", "") if isinstance(source, Image.Image) else os.fspath(source)
    return (path if isinstance(path, str) and path.isprintable() else repr(path)) or "the image"


def _read(name: str, source) -> bytes:
    try:
        data = source if isinstance(source, (bytes, bytearray)) else Path(os.fsdecode(source)).read_bytes()
    except (OSError, ValueError) as error:              # ValueError: a zero byte in the path
        remedy = {FileNotFoundError: "no such file; give the path of an image on this machine",
                  IsADirectoryError: "a folder; name one image inside it",
                  PermissionError: "no permission to read it; change its permissions or copy it"}
        raise ValueError(f"{name}: {remedy.get(type(error), f'{_one_line(error)}; check it')}") from None
    if not data:
        raise ValueError(f"{name}: empty; save it again")
    return data


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises while it reads an image into one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # remarks on odd metadata; what matters raises
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"{name}: over {Image.MAX_IMAGE_PIXELS} pixels; make it smaller first") from None
        except UnidentifiedImageError:
            raise ValueError(f"{name}: not an image; give a PNG, JPEG or WebP file") from None
        except Exception as error:              # decoders raise nearly anything on damaged data
            raise ValueError(f"{name}: damaged, cut off or of an odd kind ({_one_line(error)}); "
                             "save it again as an RGB PNG or JPEG") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    # Not ImageOps.exif_transpose: it writes the EXIF block anew, and fails on odd tags of no concern here.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1                                # a damaged block says nothing: as stored, as in any viewer


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:             # not "A" in getbands(): that is true of LAB
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Wide greyscale as mode L: white is 65535 in 16 bits, else the first of 1 (float), 255, 65535 that fits.

    Where some value is negative or larger still, the darkest becomes black and the brightest white.
    """
    values = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32).double()
    low, high = values.min().item(), values.max().item()        # either is NaN if any value is
    if not math.isfinite(high - low):
        raise ValueError("some pixels are NaN or infinite")
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    low, high = next(((0, white) for white in whites if low >= 0 and high <= white), (low, high))
    grey = ((values - low) * (255 / (high - low or 1))).round()
    if isinstance(image.info.get("transparency"), int):         # the one grey that a PNG declares transparent
        grey[values == image.info["transparency"]] = 255
    data = bytearray(len(grey))
    torch.frombuffer(data, dtype=torch.uint8).copy_(grey)
    return Image.frombytes("L", image.size, bytes(data))
