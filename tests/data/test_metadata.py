"""Damaged metadata around whole pixels: the pixels are used, in every reader, and it is said once."""

import io
import struct
import zlib

import numpy as np
import pytest
from made_datasets import encode, write_dataset
from made_images import chunk, png, tiff
from PIL import Image, PngImagePlugin, features

from mlpmixer_flax import UserError
from mlpmixer_flax.data import notes
from mlpmixer_flax.data.images import inspect_image, open_image, read_square
from mlpmixer_flax.data.notes import Note, summarize
from mlpmixer_flax.dataloader import open_examples

ACROSS, DOWN = np.meshgrid(np.linspace(0, 255, 24), np.linspace(40, 160, 16))
PICTURE = np.stack([ACROSS, DOWN, (ACROSS + DOWN) / 2], -1).astype(np.uint8)
SIXTY_MB = b"\0" * 60_000_000

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(notes, "_said", set())


def exif(orientation=1):
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def png_with(*, before=b"", after=b""):
    rows = [row.tobytes() for row in PICTURE]
    return png(rows, bits=8, color_type=2, width=24, before=before, after=after)


def text(kind, content):
    info = PngImagePlugin.PngInfo()
    getattr(info, kind)("key", content, zip=True)
    return b"".join(chunk(*part[:2]) for part in info.chunks)


def broken(whole):
    return whole[:-1] + bytes([whole[-1] ^ 1])  # the checksum


def jpeg_with(marker, content):
    encoded = encode(PICTURE, "JPEG", quality=95, subsampling=0)
    return encoded[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + encoded[2:]


def tiff_with_text_at(address):
    encoded = tiff(PICTURE, tags=[(270, "B", b"a description")])
    at = encoded.index(struct.pack("<HHI", 270, 1, 13)) + 8
    return encoded[:at] + struct.pack("<I", address) + encoded[at + 4 :]


DAMAGED = {
    "large zTXt": png_with(before=text("add_text", SIXTY_MB)),
    "large iTXt": png_with(before=text("add_itxt", SIXTY_MB)),
    "large text after the pixels": png_with(after=text("add_text", SIXTY_MB)),
    "many texts": png_with(before=text("add_text", SIXTY_MB[:1_000_000]) * 70),
    "large iCCP": png_with(before=chunk(b"iCCP", b"name\0\0" + zlib.compress(SIXTY_MB))),
    "iCCP of an unknown kind": png_with(before=chunk(b"iCCP", b"name\0\7...")),
    "checksum of a text": png_with(before=broken(chunk(b"tEXt", b"key\0value"))),
    "checksum of EXIF": png_with(before=broken(chunk(b"eXIf", exif()[6:]))),
    "short pHYs": png_with(before=chunk(b"pHYs", b"\0\1")),
    "short gAMA": png_with(before=chunk(b"gAMA", b"")),
    "PNG EXIF": png_with(before=chunk(b"eXIf", b"nothing to read")),
    "PNG raw profile": png_with(before=chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz zz\n")),
    "JPEG EXIF": encode(PICTURE, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0not a header"),
    "JPEG EXIF beside a density": encode(
        PICTURE, "JPEG", quality=95, subsampling=0, dpi=(72, 72), exif=b"Exif\0\0not a header"
    ),
    "JPEG EXIF of one byte": encode(PICTURE, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0\0"),
    "JPEG EXIF cut": encode(PICTURE, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0II*\0\x08\0\0\0 \0"),
    "JPEG ICC": jpeg_with(0xE2, b"ICC_PROFILE\0"),
    "JPEG Photoshop": jpeg_with(0xED, b"Photoshop 3.0\0008BIM\3\xed"),
    "JPEG Adobe": jpeg_with(0xEE, b"Adobe"),
    "JPEG JFIF": jpeg_with(0xE0, b"JFIF\0"),
    "WebP EXIF": encode(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0not a header"),
    "TIFF text": tiff_with_text_at(2**20),
}
if features.check("avif"):
    maker = Image.Exif()
    maker[0x010F] = "Maker"
    whole = encode(PICTURE, "AVIF", quality=100, subsampling="4:4:4", exif=maker.tobytes())
    DAMAGED["AVIF EXIF"] = whole.replace(b"MM\0*", b"no \0")


@pytest.mark.parametrize("name", DAMAGED)
def test_the_pixels_are_used(name, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(DAMAGED[name])
    assert inspect_image(str(path)) == (None, {Note.METADATA})
    for image in (str(path), DAMAGED[name]):
        found = np.asarray(open_image(image, "RGB")).astype(int)
        assert np.abs(found - PICTURE).max() <= (0 if "JPEG" not in name and "AVIF" not in name else 8)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_whole_metadata_gives_no_note(file_format, tmp_path):
    for options in ({}, {"exif": exif(6)}, {"exif": Image.Exif().tobytes()}, {"icc_profile": b"a profile"}):
        path = tmp_path / "image"
        path.write_bytes(encode(PICTURE, file_format, **options))
        assert inspect_image(str(path)) == (None, set())


def test_an_orientation_counts_although_other_metadata_is_damaged():
    turned = np.rot90(PICTURE)  # as a camera stores an image with orientation 6
    rows = [np.ascontiguousarray(row).tobytes() for row in turned]
    for damage in (text("add_text", SIXTY_MB), broken(chunk(b"tEXt", b"key\0value"))):
        before = chunk(b"eXIf", exif(6)[6:]) + damage
        encoded = png(rows, bits=8, color_type=2, width=16, before=before)
        np.testing.assert_array_equal(open_image(encoded, "RGB"), PICTURE)
    encoded = encode(np.ascontiguousarray(turned), "JPEG", quality=95, subsampling=0, exif=exif(6))
    damaged = b"\xff\xe2" + struct.pack(">H", 14) + b"ICC_PROFILE\0"
    found = np.asarray(open_image(encoded[:2] + damaged + encoded[2:], "RGB")).astype(int)
    assert np.abs(found - PICTURE).max() <= 8


def test_damaged_pixels_stay_refused(tmp_path):
    for encoded in (DAMAGED["large zTXt"], DAMAGED["JPEG ICC"], DAMAGED["TIFF text"]):
        cut = encoded[: len(encoded) // 2]
        with pytest.raises(UserError, match="cannot be used"):
            open_image(cut, "RGB")
    chunk_of_pixels = DAMAGED["checksum of a text"].index(b"IDAT") + 20
    changed = bytearray(DAMAGED["checksum of a text"])
    changed[chunk_of_pixels] ^= 255
    with pytest.raises(UserError, match="cannot be used"):
        open_image(bytes(changed), "RGB")


# --- said once


def test_a_note_is_printed_once_with_the_first_name(tmp_path, capsys):
    options = {"channels": 3, "size_px": 8, "crop_fraction": 1.0, "interpolation": "bilinear"}
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(DAMAGED["JPEG EXIF"])
        read_square(tmp_path / f"{number}.jpg", **options)
    printed = capsys.readouterr()
    assert printed.out == ""  # stdout may be CSV or JSON
    (line,) = printed.err.splitlines()
    assert f"image '{tmp_path}/0.jpg' and others like it" in line and "because it is damaged" in line
    read_square(tiff(np.arange(64).reshape(8, 8, 1).astype(np.uint16)), **options)
    read_square(tiff(np.arange(64).reshape(8, 8, 1).astype(np.uint16) * 1000), **options)  # 16 bits: no note
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("took 255 for white in the image of ")


def test_notes_of_a_folder_are_counted():
    assert summarize({"a.png": [], "b.png": [Note.WHITE_65535]}) == []
    (line,) = summarize({"b.png": [Note.METADATA], "a.png": [Note.METADATA], "c.png": []})
    assert "of 2 images, for example 'a.png', because it is damaged" in line
    (line,) = summarize({"caf\udce9.tif": [Note.WHITE_255]})
    assert line.startswith(r"took 255 for white in 1 image, for example 'caf\udce9.tif': ")
    line.encode()
    found = {"dark.tif": [Note.WHITE_255], "light.tif": [Note.WHITE_4095], "sun.tif": [Note.WHITE_65535]}
    lines = summarize(found)
    assert len(lines) == 4 and "scaled differently" in lines[-1]
    assert len(summarize({f"{i}.tif": [Note.WHITE_255] for i in range(10_000)})) == 1  # no list without bound


def test_a_tfds_dataset_is_read_and_named_once(tmp_path, capfd):
    names = list(DAMAGED)
    examples = [(DAMAGED[name], i % 3) for i, name in enumerate(names) if name != "TIFF text"]
    write_dataset(tmp_path, "damaged", {"train": examples})
    capfd.readouterr()
    for cache_bytes in (0, 2**30):
        opened = open_examples(
            "damaged", "train", data_dir=str(tmp_path), image_size_px=16, cache_bytes=cache_bytes
        )
        images, _ = opened.read(np.arange(len(opened)))
        expected = open_image(PICTURE, "RGB").resize((16, 16), Image.Resampling.BILINEAR, (4, 0, 20, 16))
        assert np.abs(images.astype(int) - np.asarray(expected)).max() <= 8
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ignored")]
    assert len(lines) == 1 and "image 0 (train-0) of split 'train' of dataset 'damaged'" in lines[0]


def test_a_pillow_image_with_damaged_exif_is_used(capsys):
    image = Image.open(io.BytesIO(DAMAGED["JPEG EXIF"]))
    assert np.abs(np.asarray(open_image(image, "RGB")).astype(int) - PICTURE).max() <= 8
    assert "the Pillow image of 24x16 px and others like it" in capsys.readouterr().err
