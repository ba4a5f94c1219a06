"""What the tests of images share: transformers' processor, random images and files, and refusals."""
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from model.config import VisionConfig
from model.image_tokens import Tiles
from weights.image_file import FORMATS, open_image

Image.init()
KINDS = [kind for kind in FORMATS if kind in Image.SAVE]        # older versions of Pillow have no AVIF
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
             for name, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def refusal(source) -> str:
    """The one line with which an image is refused, after which nothing may have been warned of either."""
    with warnings.catch_warnings(record=True) as seen, pytest.raises(ValueError) as caught:
        warnings.simplefilter("always")
        open_image(source)
    message = str(caught.value)
    assert not seen and "\n" not in message and "<_io" not in message and message.isprintable()
    assert len(message) <= 700
    return message
