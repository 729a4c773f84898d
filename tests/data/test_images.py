"""Decoding of image files: formats, orientation, alpha, bit depth, and files that are refused."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from made_datasets import encode
from made_images import deep_png
from PIL import Image, features

from mlpmixer_flax import UserError
from mlpmixer_flax.data.images import inspect_image, open_image

# Smooth, so that JPEG hardly changes it; looks different in each of the eight orientations.
ACROSS, DOWN = np.meshgrid(np.linspace(0, 255, 24), np.linspace(40, 160, 16))
PICTURE = np.stack([ACROSS, DOWN, (ACROSS + DOWN) / 2], -1).astype(np.uint8)
GRAY = PICTURE[..., 0]


def decode_image(file):
    return np.asarray(open_image(file, "RGB"))


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("TGA", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG2000", {}, 0),
        ("AVIF", {"quality": 95}, 12),
        ("GIF", {}, 40),  # only 256 colours
    ],
)
def test_every_format_is_decoded_from_file_and_bytes(tmp_path, file_format, options, tolerance):
    if file_format in ("WEBP", "JPEG2000", "AVIF"):
        if not features.check({"JPEG2000": "jpg_2000"}.get(file_format, file_format.lower())):
            pytest.skip(f"Pillow is built without {file_format}")
    encoded = encode(PICTURE, file_format, **options)
    path = tmp_path / "image"
    path.write_bytes(encoded)
    for file in (encoded, path, str(path)):
        image = decode_image(file)
        assert image.shape == (16, 24, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - PICTURE).max() <= tolerance


# EXIF orientation -> how the upright image is changed before it is stored.
STORED = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_photo_is_upright(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](PICTURE))
    image = decode_image(encode(stored, file_format, exif=exif, quality=95))
    assert image.shape == PICTURE.shape
    assert np.abs(image.astype(int) - PICTURE).mean() < (1 if file_format in ("PNG", "TIFF") else 4)


def test_white_shows_through_alpha_of_any_kind():
    left_half = np.where(np.arange(24) < 12, 0, 255).astype(np.uint8) * np.ones((16, 1), np.uint8)
    half = np.full((16, 24), 128, np.uint8)
    rgba = np.concatenate([PICTURE, left_half[..., None]], -1)
    palette = Image.fromarray(np.where(left_half == 0, 7, 9).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0] * 9 + [200, 100, 50])
    expected = np.where(left_half[..., None] == 0, 255, PICTURE)
    for encoded, pixels in [
        (encode(rgba), expected),
        (encode(rgba, "WEBP", lossless=True), expected),
        (encode(Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(left_half)])), expected[..., :1]),
        (encode(palette, transparency=7), np.where(left_half[..., None] == 0, 255, [200, 100, 50])),
        (encode(palette, "GIF", transparency=7), np.where(left_half[..., None] == 0, 255, [200, 100, 50])),
        (encode(Image.fromarray(PICTURE * 0), transparency=(0, 0, 0)), np.uint8(255)),
        (encode(np.concatenate([PICTURE * 0, half[..., None]], -1)), np.uint8(127)),
    ]:
        np.testing.assert_array_equal(decode_image(encoded), np.broadcast_to(pixels, PICTURE.shape))
    np.testing.assert_array_equal(open_image(encode(rgba), "RGBA"), rgba)
    assert np.asarray(open_image(encode(rgba), "L"))[0, 0] == 255


DEEP = np.array([[0, 256, 32768, 65535]], np.uint16)


@pytest.mark.parametrize(
    "encoded",
    [
        deep_png(DEEP[..., None]),
        deep_png(np.stack([DEEP] * 3, -1)),
        encode(DEEP, "TIFF"),
        encode(DEEP.astype(">u2"), "TIFF"),
        encode(DEEP.astype(np.int32), "TIFF"),
        b"P5 4 1 65535\n" + DEEP.astype(">u2").tobytes(),
    ],
    ids=["PNG gray", "PNG RGB", "TIFF", "TIFF big-endian", "TIFF 32 bits", "PGM"],
)
def test_16_bits_are_scaled_not_clipped(encoded):
    expected = np.repeat(np.array([[0, 1, 128, 255]])[..., None], 3, -1)
    np.testing.assert_array_equal(decode_image(encoded), expected)


def test_values_with_an_unknown_white_are_refused():
    for pixels, words in [
        (DEEP.astype(np.float32) / 65535, r"float32 from 0.0 to 1.0, not 8 or 16 bits per channel"),
        (DEEP.astype(np.int32) * 2, r"int32 from 0 to 131070, not 8 or 16 bits per channel"),
        (-DEEP.astype(np.int32), r"int32 from -65535 to 0, not 8 or 16 bits per channel"),
    ]:
        with pytest.raises(UserError, match=words):
            decode_image(encode(pixels, "TIFF"))


def test_cmyk_bits_and_gray_become_rgb():
    cmyk = decode_image(encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - PICTURE).mean() < 4
    np.testing.assert_array_equal(decode_image(encode(GRAY)), np.stack([GRAY] * 3, -1))
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(GRAY > 99))), np.stack([np.where(GRAY > 99, 255, 0)] * 3, -1)
    )


def test_an_image_that_cannot_be_used_is_refused_by_name(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "noise.jpg").write_bytes(bytes(range(256)))
    (tmp_path / "cut.bmp").write_bytes(encode(PICTURE, "BMP")[:-100])
    for name, words in [
        ("missing.jpg", "FileNotFoundError"),
        ("empty.jpg", "empty, cut short or not an image"),
        ("noise.jpg", "empty, cut short or not an image"),
        ("cut.bmp", "truncated"),
    ]:
        with pytest.raises(UserError, match=f"^image '.*{name}' cannot be used .*{words}.*: repair it"):
            decode_image(tmp_path / name)
    with pytest.raises(UserError, match="^the image of 8 bytes cannot be used"):
        decode_image(bytes(8))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"mode": "CMYK"}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_an_image_cut_short_anywhere_is_found(tmp_path, file_format, options):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)
    encoded = encode(image.convert(options.pop("mode", "RGB")), file_format, **options)
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert inspect_image(str(path))[0] is None
    for share in (0, 0.001, 0.03, 0.25, 0.5, 0.75, 0.9, 0.98):
        path.write_bytes(encoded[: int(len(encoded) * share)])
        assert inspect_image(str(path))[0], f"{share:.1%} of a {file_format} file are taken for an image"


# --- Pillow images and arrays


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_pillow_images_and_arrays_equal_the_file_with_the_same_pixels(mode):
    rgba = np.concatenate([PICTURE, GRAY[..., None]], -1)
    for array in (GRAY, GRAY[..., None], PICTURE, rgba, PICTURE[::-1, ::2], PICTURE.swapaxes(0, 1)):
        squeezed = np.ascontiguousarray(array.squeeze())
        from_file = open_image(encode(squeezed), mode)
        assert from_file.mode == mode
        for image in (array, Image.fromarray(squeezed), Image.open(io.BytesIO(encode(squeezed)))):
            np.testing.assert_array_equal(open_image(image, mode), from_file)


def test_a_pillow_image_is_turned_upright_and_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encode(np.ascontiguousarray(STORED[6](PICTURE)), exif=exif)))
    np.testing.assert_array_equal(open_image(turned, "RGB"), PICTURE)
    assert turned.size == (16, 24)
    deep = Image.fromarray(DEEP)
    np.testing.assert_array_equal(open_image(deep, "L"), [[0, 1, 128, 255]])
    assert deep.mode == "I;16" and np.asarray(deep)[0, 3] == 65535


def test_one_pillow_image_may_be_read_by_several_threads():
    encoded = encode(np.tile(PICTURE, (60, 40, 1)))
    expected = np.asarray(open_image(encoded, "RGB"))
    for _ in range(5):
        image = Image.open(io.BytesIO(encoded))  # not read yet
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(open_image, [image] * 4, ["RGB"] * 4):
                np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PICTURE / 255, r"an array float64 \(16, 24, 3\) is not an image: give uint8 \(h, w\) or \(h, w, c\) with"
            r" 1, 3 or 4 channels, for example \(255 \* array\)\.round\(\)\.astype\('uint8'\)$"),
        (np.float32(PICTURE), r"an array float32 .*: give uint8"),  # levels from 0 to 255, too
        (GRAY > 99, r"an array bool \(16, 24\) is not an image"),
        (DEEP, r"an array uint16 \(1, 4\) is not an image"),
        (PICTURE[..., :2], r"an array uint8 \(16, 24, 2\) is not an image: .* 1, 3 or 4 channels"),
        (PICTURE[None], r"an array uint8 \(1, 16, 24, 3\) is not"),
        (GRAY[0], r"an array uint8 \(24,\) is not"),
        (GRAY[:0], r"an array uint8 \(0, 24\) is not"),
        (Image.new("RGB", (0, 5)), "the Pillow image of 0x5 px cannot be used .*it has no pixels.*: repair it"),
        (Image.new("F", (4, 5)), "the Pillow image of 4x5 px cannot be used .*float32 from 0.0 to 0.0"),
        (None, "image None cannot be used .*: give a file, its bytes, a Pillow image or a uint8 NumPy array$"),
        (7, "image 7 cannot be used .*: give a file, its bytes"),
        (jnp.zeros((4, 4, 3)), r"image Array.* cannot be used .*: give a file, its bytes, .* a uint8 NumPy array"),
        ([1, 2], r"image \[1, 2\] cannot be used"),
    ],
)  # fmt: skip
def test_objects_that_are_not_images_are_refused(image, message):
    with pytest.raises(UserError, match=f"^{message}"):
        open_image(image, "RGB")


# --- names in any bytes


@pytest.mark.parametrize(
    "name", [b"caf\xe9.png", b"a\nb.png", b"\x1b[31mred.png", b"~.png", "\u0436\u200e.png".encode()]
)
def test_names_of_files_may_be_any_bytes(tmp_path, name):
    file = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
    Path(file).write_bytes(encode(PICTURE))
    for image in (file, Path(file)):
        np.testing.assert_array_equal(open_image(image, "RGB"), PICTURE)
    assert inspect_image(file) == (None, set())
    Path(file).write_bytes(b"\0\0")
    with pytest.raises(UserError) as error:
        open_image(file, "RGB")
    os.remove(file)
    with pytest.raises(UserError) as missing:
        open_image(file, "RGB")
    for message in (str(error.value), str(missing.value), inspect_image(file)[0]):
        message.encode()  # it can be printed and written
        assert "\n" not in message and "\x1b" not in message
    assert repr(file) in str(error.value)


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photo.png").write_bytes(encode(PICTURE))
    for image in ("~/photo.png", Path("~/photo.png")):
        np.testing.assert_array_equal(open_image(image, "RGB"), PICTURE)
