"""No image starts a program: EPS would start Ghostscript, wherever it is hidden."""
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from image_helpers import KINDS, noise, png, refusal, saved
from PIL import EpsImagePlugin, Image

from weights.image_file import FORMATS, SAVE_AS, open_image
from weights.images import ImageProcessor


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A `gs` on PATH that leaves a file when it is started: the path of that file."""
    started, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho > '{started}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


EPS = saved(noise(40, 60), "EPS")


def iptc(body: bytes) -> bytes:
    """An IPTC/NAA file that calls its content a JPEG."""
    fields = (60, b"\1\0"), (20, struct.pack(">I", 60)), (30, struct.pack(">I", 40)), (120, b"\5")
    head = b"".join(b"\x1c\3" + bytes([tag]) + struct.pack(">H", len(data)) + data for tag, data in fields)
    return head + b"\x1c\x08\x0a\x84\0" + struct.pack(">I", len(body)) + body


def tiff(compression: int, body: bytes) -> bytes:
    """A TIFF of 60 x 40 RGB pixels whose only strip is `body`."""
    tags = {256: 60, 257: 40, 258: 8, 259: compression, 262: 2, 273: 110, 277: 3, 278: 40, 279: len(body)}
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    return head.ljust(110, b"\0") + body


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
                              for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def nested(body: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of every format that is read, with these bytes wherever it can contain another image or data."""
    image = noise(40, 60)
    for kind in KINDS:
        whole = saved(image, kind)
        for at in range(0, min(len(whole), 400), 40):
            yield kind, whole[:at] + body
            yield kind, whole[:at] + body + whole[at:]
        yield kind, whole + body
    rows = zlib.compress(bytes(181 * 40))
    header = b"IHDR", struct.pack(">IIBBBBB", 60, 40, 8, 2, 0, 0, 0)
    for name in b"IDAT", b"eXIf", b"iCCP", b"fdAT", b"zTXt":
        for data in body, zlib.compress(body), b"x\0\0" + zlib.compress(body):
            yield "PNG", png([header, (name, data), (b"IDAT", rows), (b"IEND", b"")])
    jpeg = saved(image, "JPEG")
    for marker, start in (0xE1, b"Exif\0\0"), (0xE2, b"MPF\0"), (0xED, b"Photoshop 3.0\0"), (0xFE, b""):
        segment = (start + body)[:60000]
        yield "JPEG", jpeg[:2] + struct.pack(">2BH", 0xFF, marker, 2 + len(segment)) + segment + jpeg[2:]
    yield "JPEG", saved(image, "MPO", save_all=True, append_images=[image]) + body
    yield "JPEG", saved(image, "MPO", save_all=True, append_images=[image])[:-len(jpeg) // 2] + body
    for compression in 1, 5, 6, 7, 8, 32773, 34712, 34925, 50000, 50001:
        yield "TIFF", tiff(compression, body)
    for bits, compression in (24, 4), (24, 5), (0, 4), (8, 1):
        head = struct.pack("<2s6I2H2I", b"BM", 0, 0, 54, 40, 60, 40, 1, bits, compression, 0)
        yield "BMP", head + bytes(16) + body
    for size in (len(body), 22), (0, 22), (len(body), 0):
        yield "ICO", struct.pack("<3H4B2H2I", 0, 1, 1, 60, 40, 0, 0, 1, 32, *size) + body
    extended = b"VP8X", struct.pack("<I", 0x2C) + b"\x3b\0\0\x27\0\0"
    for name in b"VP8 ", b"VP8L", b"EXIF", b"ICCP", b"ANMF", b"XMP ":
        yield "WEBP", riff((name, body))
        yield "WEBP", riff(extended, (name, body), (b"VP8 ", body))
    yield "GIF", b"GIF89a\x3c\0\x28\0\0\0\0,\0\0\0\0\x3c\0\x28\0\0\x08\xff" + body
    yield "GIF", b"GIF89a\x3c\0\x28\0\0\0\0!\xfe\xff" + body
    yield "PPM", b"P6\n60 40\n255\n" + body
    box = b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    yield "JPEG2000", box + struct.pack(">I4s", 8 + len(body), b"jp2c") + body
    yield "AVIF", b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + struct.pack(">I4s", 8 + len(body), b"mdat") + body


def test_the_fake_ghostscript_is_started_where_pillow_is_left_to_itself(ghostscript):
    for data in EPS, iptc(EPS):
        with suppress(Exception):
            Image.open(BytesIO(data)).load()
        assert ghostscript.exists()
        ghostscript.unlink()


def test_no_image_starts_ghostscript(ghostscript, tmp_path):
    tried = set()
    for data in EPS, iptc(EPS), iptc(iptc(EPS)), iptc(saved(noise(9, 9), "JPEG")):
        path = tmp_path / "called.png"
        path.write_bytes(data)
        assert refusal(data) == f"the image's bytes: not an image in a format that is read here; {SAVE_AS}"
        assert "not an image in a format that is read here" in refusal(path)
    for inner in EPS, iptc(EPS):
        for kind, data in nested(inner):
            tried.add(kind)
            with suppress(ValueError):
                assert open_image(data).mode == "RGB"
    assert tried == set(FORMATS)
    assert not ghostscript.exists()


@pytest.mark.parametrize("data", [EPS, iptc(EPS)], ids=["EPS", "IPTC"])
def test_an_image_that_was_only_opened_does_not_start_it_either(ghostscript, data):
    opened = Image.open(BytesIO(data))
    assert f"its format, {opened.format}, is none that is read here" in refusal(opened)
    with pytest.raises(ValueError, match=f"image 1.*{opened.format}|image 1 has mode L"):
        ImageProcessor(56)([opened])
    assert not ghostscript.exists()


def test_a_format_that_is_not_read_passes_once_the_caller_has_converted_it():
    opened = Image.open(BytesIO(saved(noise(5, 6), "TGA")))
    assert "image.convert('RGB')" in refusal(opened)
    assert open_image(opened.convert("RGB")).tobytes() == noise(5, 6).tobytes()


def test_every_listed_format_is_read_and_named():
    for kind in KINDS:
        assert open_image(saved(noise(32, 32), kind)).size == (32, 32)
    opened = Image.open(BytesIO(saved(noise(40, 60), "MPO", save_all=True, append_images=[noise(40, 60)])))
    assert opened.format == "MPO" and open_image(opened).size == (60, 40)
    assert {*FORMATS} - {*KINDS} <= {"AVIF"}
    words = SAVE_AS.upper().replace(" ", "").replace("SAVEITAS", "").replace("OR", ",").split(",")
    assert sorted(words) == sorted(FORMATS)
