"""A number that tells the weights of one checkpoint from those of another."""
import zlib
from pathlib import Path

from weights.files import read_bytes

SMALL = 100_000_000         # bytes of weights that are read to tell them from others


def fingerprint(folder: Path, config: str = "config.json") -> int:
    """A number that other weights hardly share, and quickly computed: of the configuration and of the first
    file of weights, or only of its size where it is large."""
    value = zlib.crc32(read_bytes(folder / config))
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        size = path.stat().st_size
        value = zlib.crc32(read_bytes(path, SMALL) if size < SMALL else str(size).encode(), value)
    return value
