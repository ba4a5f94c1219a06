"""Images become Tiles, the input of the vision encoder.

    RGB image (image_file.py) ── canvas, resize, pad, normalise, cut ─► Tiles ─► model/vision.py

`ImageProcessor` chooses a canvas of 1 to 4 square tiles for each image, resizes the image to fit inside,
pads it at the bottom and on the right, normalises it and cuts it into tiles.

I images, T tile slots, S tile side in pixels. Sizes are (height, width) and grids (rows, columns); PIL says
(width, height). Trap: padding in the canvas is black before normalising, but a slot without a tile is 0.0
after normalising.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from model.config import VisionConfig
from model.image_tokens import Grid, Tiles
from weights.files import exists, read_json
from weights.image_file import decode
from weights.messages import named, quoted


def choose_canvas(height: int, width: int, tile: int, ratios: tuple[Grid, ...]) -> Grid:
    """The grid of tiles for an image of this size in pixels: the one that enlarges it least.

    If all grids shrink it, the one that shrinks it least. Of grids that scale it equally, the one with the
    fewest tiles; of those, the first.
    """
    scales = canvas_scales(height, width, tile, ratios)
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((grid for grid in ratios if scales[grid] == best), key=math.prod)


def canvas_scales(height: int, width: int, tile: int, ratios: tuple[Grid, ...]) -> dict[Grid, float]:
    """How many times as large an image of this size in pixels would be if it filled each grid of tiles."""
    return {(rows, columns): min(rows * tile / height, columns * tile / width) for rows, columns in ratios}


def fit(height: int, width: int, grid: Grid, tile: int) -> tuple[int, int]:
    """The height and width in pixels that an image gets inside a canvas of `grid` tiles; it keeps its shape.

    A small image grows only until its longer side fills one tile, whatever the canvas.
    """
    room_h = min(max(height, tile), grid[0] * tile)
    room_w = min(max(width, tile), grid[1] * tile)
    scale_h, scale_w = room_h / height, room_w / width
    if scale_w < scale_h:
        return min(max(math.floor(height * scale_w), 1), room_h), room_w   # a 1 x 10000 strip keeps one pixel
    return room_h, min(max(math.floor(width * scale_h), 1), room_w)


@dataclass(frozen=True)
class ImageProcessor:
    """Turns RGB images into Tiles, bit for bit as the official code does; the defaults are its values.

    Raises ValueError where the settings give pixels that are not finite.
    """
    tile_size: int
    max_tiles: int = VisionConfig.max_num_tiles             # slots per image, whatever its canvas
    canvases: tuple[Grid, ...] = VisionConfig.supported_aspect_ratios
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BILINEAR
    do_rescale: bool = True
    do_normalize: bool = True

    def __post_init__(self):
        darkest_and_brightest = torch.tensor([[0] * 3, [255] * 3])                              # [2, 3]
        pixels = self._normalise(darkest_and_brightest).bfloat16()      # what bf16 can hold, fp32 can hold
        if not pixels.isfinite().all():
            raise ValueError(f"image_mean {quoted(self.image_mean)}, image_std {quoted(self.image_std)} and "
                             f"rescale_factor {quoted(self.rescale_factor)} give pixels that are not finite; "
                             "use the values of the official checkpoint")

    @classmethod
    def from_folder(cls, folder: str | Path, vision: VisionConfig) -> "ImageProcessor":
        """Read a checkpoint's preprocessing, with the official value for whatever its file leaves out.

        Trap: transformers' class would fill such gaps with 224 pixels and a mean that no Llama had.
        Raises ValueError with one line where the file is broken or contradicts the model.
        """
        path, settings = _read_settings(Path(folder))
        try:
            canvases = _check_settings(settings, vision)
            ours = {name: tuple(value) if isinstance(value, list) else value
                    for name, value in settings.items() if name in FIELDS}
            return cls(tile_size=vision.image_size, max_tiles=vision.max_num_tiles, canvases=canvases, **ours)
        except ValueError as error:
            raise ValueError(f"{named(path)}: {error}") from None

    def __call__(self, images: list[Image.Image]) -> Tiles:
        """Cut RGB images, as `open_image` gives them, into Tiles. Raises ValueError for anything else.

        The pixels are [I, T, 3, S, S] float32; no images give Tiles of no images.
        """
        _check_images(images)
        pixels = torch.zeros(len(images), self.max_tiles, 3, self.tile_size, self.tile_size)
        grids = torch.zeros(len(images), 2, dtype=torch.int64)
        for i, image in enumerate(images):
            rows, columns = self.grid(image)
            canvas = self._normalise(self._draw(image, (rows, columns)))                      # [H, W, 3]
            pixels[i, :rows * columns] = rearrange(canvas, "(r h) (c w) k -> (r c) k h w", r=rows, c=columns)
            grids[i] = torch.tensor((rows, columns))
        return Tiles(pixels, grids)

    def grid(self, image: Image.Image) -> Grid:
        """The rows and columns of tiles that an image is cut into."""
        return choose_canvas(image.height, image.width, self.tile_size, self.canvases)

    def _draw(self, image: Image.Image, grid: Grid) -> Tensor:
        """The resized image in the upper left of a black canvas, [H, W, 3] uint8."""
        height, width = fit(image.height, image.width, grid, self.tile_size)
        canvas = Image.new("RGB", (grid[1] * self.tile_size, grid[0] * self.tile_size))
        canvas.paste(image.resize((width, height), self.resample))
        flat = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)               # [H * W * 3]
        return flat.view(canvas.height, canvas.width, 3)

    def _normalise(self, canvas: Tensor) -> Tensor:
        # The official order of rounding: a float64 product, then float32 for the rest.
        x = (canvas.double() * float(self.rescale_factor)).float() if self.do_rescale else canvas.float()
        return (x - x.new_tensor(self.image_mean)) / x.new_tensor(self.image_std) if self.do_normalize else x


def _check_images(images: list[Image.Image]):
    """Raise ValueError unless these are RGB images; decode those that were only opened."""
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images is of type {type(images).__name__}, but must be a list of PIL images")
    for number, image in enumerate(images, start=1):
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {number} is of type {type(image).__name__}; pass what open_image gives")
        if image.mode != "RGB" or 0 in image.size:
            raise ValueError(f"image {number} has mode {image.mode} and size {image.size}, "
                             "so is not an RGB image; pass what open_image gives")
        decode(image, f"image {number}")


# --- preprocessor_config.json ---

def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max           # False for NaN, infinity and 10 ** 400


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(v) for v in value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


CHECKS = {      # setting: what it must be, in words and as a test
    "image_mean": ("three numbers", _is_colour),
    "image_std": ("three numbers above 0", lambda v: _is_colour(v) and min(v) > 0),
    "rescale_factor": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "resample": ("one of Pillow's filters, 0 to 5", lambda v: type(v) is int and 0 <= v <= 5),
    "do_rescale": ("true or false", _is_flag),
    "do_normalize": ("true or false", _is_flag),
    "max_image_tiles": ("a whole number of at least 1", lambda v: type(v) is int and v >= 1),
    "do_resize": ("true: the model only sees whole tiles", lambda v: v is True),
    "do_pad": ("true: the model only sees whole tiles", lambda v: v is True),
}
FIELDS = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")


def _read_settings(folder: Path) -> tuple[Path, dict]:
    """The image settings of a checkpoint and their file; empty where it has none. Null means left out.

    transformers 5 writes them into processor_config.json, which wins; others write preprocessor_config.json.
    """
    for name in "processor_config.json", "preprocessor_config.json":
        path = folder / name
        data = read_json(path) if exists(path) else {}
        if name == "processor_config.json" and isinstance(data, dict):
            data = data.get("image_processor")
            data = {} if data is None else data
        if not isinstance(data, dict):
            raise ValueError(f"{named(path)}: holds a {type(data).__name__} where the settings should be")
        if data:
            return path, {key: value for key, value in data.items() if value is not None}
    return folder / "preprocessor_config.json", {}


def _check_settings(settings: dict, vision: VisionConfig) -> tuple[Grid, ...]:
    """The canvases that the settings allow; ValueError where one is unusable or contradicts the model."""
    for name, (wanted, is_good) in CHECKS.items():
        if name in settings and not is_good(settings[name]):
            raise ValueError(f"{name} is {quoted(settings[name])}, but must be {wanted}")
    side = vision.image_size
    size = settings.get("size", {"height": side, "width": side})
    if not isinstance(size, dict) or (size.get("height"), size.get("width")) != (side, side):
        raise ValueError(f"size is {quoted(size)}, but config.json's image_size is {side}; "
                         "use the files of one model")
    most = settings.get("max_image_tiles", vision.max_num_tiles)
    canvases = tuple(grid for grid in vision.supported_aspect_ratios if math.prod(grid) <= most)
    if most > vision.max_num_tiles or not canvases:
        raise ValueError(f"max_image_tiles is {quoted(most)}, but config.json says {vision.max_num_tiles} "
                         f"tiles, grids {quoted(vision.supported_aspect_ratios)}; use the files of one model")
    return canvases
