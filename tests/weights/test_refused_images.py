"""What is refused: no image waits for ever, fills the memory or ends in a traceback; each gets one line."""
import base64
import os
import random
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from image_helpers import KINDS, noise, png, refusal, saved
from PIL import Image

from weights import image_file
from weights.image_file import MAX_BYTES, MAX_MEMORY, SAVE_AS, memory_needed, open_image

ROOT = Path(__file__).parents[2]


# --- a file is a regular file of bounded size ---

def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, without_permission):
    missing, empty, text = tmp_path / "missing.png", tmp_path / "empty.png", tmp_path / "text.png"
    empty.write_bytes(b"")
    text.write_text("not an image\n" * 50)
    assert refusal(missing) == f"{missing}: no such file; give the path of an image on this machine"
    assert refusal(tmp_path) == f"{tmp_path}: a folder; name one image inside it"
    assert refusal(empty) == f"{empty}: empty; save it again"
    assert refusal(text) == f"{text}: not an image in a format that is read here; {SAVE_AS}"
    assert refusal(f"{text}/x.png").startswith(f"{text}/x.png: ")
    assert refusal(b"") == "the image's bytes: empty; save it again"
    assert refusal(b"GIF89a").startswith("the image's bytes: ")
    assert refusal(7) == "an image is a path, bytes or a PIL image, not int"
    assert refusal(None) == "an image is a path, bytes or a PIL image, not NoneType"
    with without_permission(tmp_path):
        assert refusal(text) == f"{text}: no permission to read it; change its permissions or copy it"


def test_odd_names_are_shown_in_one_line(tmp_path):
    assert refusal("line\nbreak.png").startswith(r"line\nbreak.png: no such file")
    assert refusal("zero\0byte.png").startswith(r"zero\x00byte.png: no possible path (embedded null byte)")
    assert refusal("half \ud800.png").startswith(r"half \ud800.png: no possible path (")
    assert refusal("x" * 300).startswith("…xxx")
    assert refusal("x/" * 5000).startswith("…")
    bytes_name = tmp_path / os.fsdecode(b"caf\xe9.png")
    assert refusal(bytes_name) == f"{tmp_path}/caf\\udce9.png: no such file; " \
                                  "give the path of an image on this machine"
    bytes_name.write_bytes(saved(noise(5, 6), "PNG"))
    assert open_image(bytes_name).size == (6, 5)
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    assert refusal(loop) == f"{loop}: cannot be read (Too many levels of symbolic links); check the path"


def test_what_stands_for_an_image_in_another_way_gets_its_own_advice():
    text = base64.b64encode(saved(noise(300, 300), "PNG")).decode()
    assert len(text) > 262_144
    for source in text, text[:80], text.encode():
        assert "base64 text, where a path or the bytes of a file are expected; decode it" in refusal(source)
    for kind in {*KINDS} - {"PPM", "ICO"}:
        assert "base64" in refusal(base64.b64encode(saved(noise(9, 9), kind)).decode())
    for source in "data:image/png;base64," + text, f"data:image/png;base64,{text}".encode(), "data:,x":
        assert "a data URI, where a path or the bytes of a file are expected; decode it" in refusal(source)
    for source in "https://example.org/a.png", Path("http://example.org/a.png"), "s3://bucket/a.png":
        assert "a URL, where a path or the bytes of a file are expected; download it" in refusal(source)


def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)             # the path of a socket has at most 107 letters
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path in "pipe", "socket", "/dev/zero", "/dev/null":
            says = "a pipe, a socket or a device; save the image as a file and give its path"
            assert refusal(path) == f"{path}: {says}"


def test_a_file_of_more_than_the_bound_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(saved(noise(5, 6), "PNG"))
    os.truncate(path, MAX_BYTES + 1)        # sparse: it takes no room
    assert refusal(path) == f"{path}: over 512 MiB; compress it or make it smaller first"
    os.truncate(path, MAX_BYTES // 1000)
    assert open_image(path).size == (6, 5)
    monkeypatch.setattr(image_file, "MAX_BYTES", 100)
    assert "over 512 MiB" in refusal("/proc/self/maps")     # a file whose size the system gives as 0
    assert "over 512 MiB" in refusal(saved(noise(20, 20), "PNG"))


# --- what an image may cost ---

def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose data is missing: decoding it would be another error."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(b""))])


def test_a_bomb_is_refused_before_it_is_decoded():
    filters, limit = list(warnings.filters), 2 * Image.MAX_IMAGE_PIXELS
    for width, height in (60000, 60000), (1, 2 ** 31 - 1), (20000, limit // 20000 + 1):
        says = f"over {limit} pixels; make it smaller first"
        assert refusal(bomb(width, height)) == f"the image's bytes: {says}"
    for width, height in (1, 89_000_000), (13377, 13377), (36_000_000, 1):
        says = f"{width} x {height} pixels would take over 2 GiB of memory; make it smaller first"
        assert refusal(bomb(width, height)) == f"the image's bytes: {says}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(BytesIO(bomb(width, height)))
        assert refusal(opened) == f"the image: {says}"
    for width, height in (12000, 14900), (1, 35_000_000):
        assert "damaged" in refusal(bomb(width, height))        # within the limit: decoded, in vain
    assert limit == 2 * Image.MAX_IMAGE_PIXELS and warnings.filters == filters
    inner = bomb(60000, 60000)
    icon = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    assert "pixels; make it smaller" in refusal(icon)           # a small image that holds a large one


def test_the_bound_is_what_reading_costs_in_each_format():
    assert memory_needed(12000, 14900, "JPEG") < MAX_MEMORY < memory_needed(13377, 13377, "JPEG")
    assert memory_needed(10000, 11900, "WEBP") < MAX_MEMORY < memory_needed(10000, 12000, "WEBP")
    assert memory_needed(8000, 8300, "JPEG2000") < MAX_MEMORY < memory_needed(8192, 8192, "JPEG2000")
    assert memory_needed(1, 35_000_000, "PNG") < MAX_MEMORY < memory_needed(1, 36_000_000, "PNG")


PEAK = """
import re, sys
from weights.image_file import memory_needed, open_image
from weights.images import ImageProcessor
from PIL import Image
def memory(which):
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
Image.init()
processor = ImageProcessor(56)
processor([Image.new("RGB", (8, 8))])       # torch and Pillow load their parts
before = memory("VmRSS")
for path in sys.argv[2:]:
    processor([open_image(path)])
try:
    open_image(sys.argv[1])
except ValueError:
    print(memory("VmHWM") - before)     # not ru_maxrss: that of the test's own process counts there
"""


def test_the_peak_of_memory_is_what_is_said_and_nothing_else_is_said(tmp_path):
    """Modes whose conversion at once would take 16 to 26 bytes a pixel, a strip, a TIFF that Pillow logs."""
    ramp = Image.linear_gradient("L").resize((3000, 2000))
    Image.merge("RGBA", [ramp] * 4).save(tmp_path / "rgba.png", compress_level=1)
    Image.frombytes("I;16", ramp.size, bytes(12_000_000)).save(tmp_path / "wide.png", compress_level=1)
    Image.new("L", (1, 1_000_000)).save(tmp_path / "strip.png", compress_level=1)
    three, many = (struct.pack("<2HIH", 277, 3, 1, samples) for samples in (3, 99))
    (tmp_path / "logged.tif").write_bytes(saved(noise(64, 64), "TIFF").replace(three, many))
    files = [str(tmp_path / name) for name in ("logged.tif", "strip.png", "wide.png", "rgba.png")]
    run = subprocess.run([sys.executable, "-c", PEAK, *files], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    assert run.stderr == ""
    assert int(run.stdout) < memory_needed(3000, 2000, "PNG") + 2 ** 25     # one band, and plugins of Pillow


@pytest.mark.parametrize("place", ["regular_file", "decode"])
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, place):
    def exhausted(*arguments):
        raise MemoryError
    path = tmp_path / "x.png"
    path.write_bytes(saved(noise(5, 6), "PNG"))
    if place == "decode":
        monkeypatch.setattr(Image.Image, "load", exhausted)
    else:
        monkeypatch.setattr(image_file, place, exhausted)
    says = "this machine has too little memory to read it; make it smaller first"
    assert refusal(path) == f"{path}: {says}"


# --- damage ---

@pytest.mark.parametrize("kind", KINDS)
def test_truncated_images_are_refused_wherever_they_end(tmp_path, kind):
    whole = saved(noise(64, 64), kind)
    path = tmp_path / "cut.bin"
    for share in 0.02, 0.3, 0.6, 0.9:
        path.write_bytes(whole[:int(len(whole) * share)])
        message = refusal(path)
        assert message.startswith(f"{path}: ") and ("damaged" in message or "not an image" in message)
    assert open_image(whole).size == (64, 64)


def test_libtiff_writes_nothing_on_standard_error(capfd):
    data = bytearray(saved(noise(64, 64), "TIFF", compression="tiff_deflate"))
    data[5000] ^= 0x55
    with pytest.raises(OSError):
        Image.open(BytesIO(data)).load()
    assert "ZIPDecode" in capfd.readouterr().err            # Pillow alone
    assert "damaged" in refusal(data)
    assert capfd.readouterr().err == ""
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_random_damage_gives_an_image_or_one_line():
    rng = random.Random(7)
    refused = 0
    for kind in KINDS:
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


def test_images_of_an_odd_kind_are_refused_in_one_line():
    assert refusal(Image.new("La", (3, 3))).startswith("the image: damaged, cut off or of an odd kind")
    assert "NaN" in refusal(Image.frombytes("F", (2, 1), struct.pack("<2f", 1, float("nan"))))
    assert "infinite" in refusal(Image.frombytes("F", (2, 1), struct.pack("<2f", 1, float("inf"))))
    says = "0 x 3 pixels, so there is nothing to see; save it again"
    assert refusal(Image.new("F", (0, 3))) == f"the image: {says}"
    closed = noise(5, 6)
    closed.close()
    assert refusal(closed).startswith("the image: damaged, cut off or of an odd kind")
