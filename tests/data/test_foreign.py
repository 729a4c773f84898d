"""Files that are no images are named, with what to do; HEIC is read if pillow-heif is installed."""

import gzip
import io
import os
import re
import sys
import types
import zipfile

import numpy as np
import pytest
from made_datasets import encode
from PIL import EpsImagePlugin, Image, ImageFile

from mlpmixer_flax import UserError
from mlpmixer_flax.data import files
from mlpmixer_flax.data.images import inspect_image, open_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HEIC, "a HEIC photo, .*: save it as JPEG or PNG, or pip install pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0heic" + bytes(100), "a HEIC photo"),
        (b"\xff\x0a" + bytes(50), "a JPEG XL image, .*: save it as JPEG or PNG"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF file, .*: save its pages as images"),
        (b"\0\0\0\x20ftypisom\0\0\2\0" + bytes(50), "a video, .*: save frames of it"),
        (zipped(), "an archive, .*: unpack it"),
        (gzip.compress(b"photo", mtime=0), "an archive"),
        (b"cat.png".ljust(257, b"\0") + b"ustar\x0000", "an archive, .*: unpack it"),
        (bytes(128) + b"DICM" + bytes(50), "a DICOM file, .*: save it as PNG or TIFF"),
        (b"\x93NUMPY\1\0v\0{'descr': '|u1'}\n", "a NumPy array, .*: load it, and give the array as uint8"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer, .*: run git lfs pull",
        ),
        (
            b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg width="9"/>',
            "an SVG drawing, .*: save it as PNG",
        ),
        (b"<!DOCTYPE html>\n<html>404</html>", "a web page, .*: download the image itself"),
        (
            b"file,label\na.jpg,cat\n",
            "a text file, .*: give images, and if it lists images, give their names",
        ),
        ("Größe;Straße\n1;2\n".encode("latin-1") * 9, "a text file"),
        ("file,label\n".encode("utf-16"), "a text file"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, data, words):
    path = tmp_path / "photo.jpg"  # whatever its name says
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^image '{path}' cannot be used: it is {words}") as error:
        open_image(path, "RGB")
    assert inspect_image(str(path))[0] == str(error.value).partition("cannot be used: ")[2]
    with pytest.raises(UserError, match=f"^the image of .* bytes cannot be used: it is {words}"):
        open_image(data, "RGB")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF"])
def test_an_image_cut_after_any_of_its_first_bytes_is_not_taken_for_text(file_format):
    if file_format == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("Pillow is built without AVIF")
    encoded = encode(np.full((20, 30, 3), 90, np.uint8), file_format)
    for length in range(40):
        with pytest.raises(UserError) as error:
            open_image(encoded[:length], "RGB")
        assert "text file" not in str(error.value), encoded[:length]


def test_images_that_are_text_are_read():
    xbm = b"#define im_width 8\n#define im_height 1\nstatic char im_bits[] = {\n0x0f };\n"
    np.testing.assert_array_equal(open_image(xbm, "L"), Image.open(io.BytesIO(xbm)).convert("L"))
    np.testing.assert_array_equal(open_image(b"P2 3 1 255\n0 100 255\n", "L"), [[0, 100, 255]])


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\0\0\0\x20ftypisom\0\0\2\0", "it is a video"),
        (b"\xff\xd8\xff", "it has 1,099,511,627,776 bytes, more than .*: save it as JPEG or PNG"),
    ],
)
def test_a_large_file_that_is_no_image_is_not_read_whole(tmp_path, head, words):
    path = tmp_path / "cat.jpg"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(2**40)  # a hole: it takes no space
    with pytest.raises(UserError, match=f"cat.jpg' cannot be used: {words}"):
        open_image(path, "RGB")
    assert re.match(words, str(inspect_image(str(path))[0]))


DRAWING = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(content):
    """Returns an IPTC file of a gray image, 9 x 9, whose pixels are another file; Pillow opens that one, too."""
    fields = {
        (3, 60): b"\1\0",
        (3, 20): b"\0\0\0\x09",
        (3, 30): b"\0\0\0\x09",
        (3, 120): b"\0\0\0\5",
        (8, 10): content,
    }
    return b"".join(bytes([0x1C, *tag]) + len(value).to_bytes(2) + value for tag, value in fields.items())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DRAWING, "it is a PostScript file, .*: save it as PNG"),
        (iptc(DRAWING), "not an image that Pillow can read"),
    ],
)
def test_postscript_starts_no_other_program(tmp_path, monkeypatch, data, words):
    """Pillow would run the program `gs` to draw it, whatever the suffix of the file."""
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for the program once
    (tmp_path / "cat.jpg").write_bytes(data)
    for image in (data, tmp_path / "cat.jpg"):
        with pytest.raises(UserError, match=words):
            open_image(image, "RGB")
    assert not (tmp_path / "started").exists()


def test_heic_is_read_if_pillow_heif_is_installed(monkeypatch):
    class Decoder(ImageFile.ImageFile):
        def _open(self):
            self._size, self._mode, self.tile = (4, 2), "RGB", []

        def load(self):
            return Image.Image.load(self)

    registered = types.SimpleNamespace(
        register_heif_opener=lambda: Image.register_open("HEIF", Decoder, lambda head: head[4:8] == b"ftyp")
    )
    for name in ("OPEN", "ID"):  # Pillow's lists of formats; the test leaves them as they were
        monkeypatch.setattr(Image, name, type(getattr(Image, name))(getattr(Image, name)))
    files.pixel_formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", registered)
    try:
        assert open_image(HEIC, "RGB").size == (4, 2)
    finally:
        files.pixel_formats.cache_clear()


def test_a_broken_pillow_heif_is_as_none(monkeypatch):
    files.pixel_formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match="HEIC"):
        open_image(HEIC, "RGB")
    files.pixel_formats.cache_clear()
