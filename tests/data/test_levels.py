"""Which level is white: 8, 12 and 16 bits in all containers, declared or found; levels are never lost."""

import io

import numpy as np
import pytest
from made_datasets import encode
from made_images import chunk, deep_png, png, tiff
from PIL import Image, features

from mlpmixer_flax import UserError
from mlpmixer_flax.data.images import inspect_image, open_image, read_square
from mlpmixer_flax.data.levels import jpeg2000_bits
from mlpmixer_flax.data.notes import Note

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16, 1)  # every level of 8 bits
TWELVE = RAMP * 16 + RAMP // 16  # 12 bits, from 0 to 4095
SIXTEEN = RAMP * 257  # 16 bits, from 0 to 65535
COLORS = np.concatenate([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


def decode(file, mode="L"):
    return np.asarray(open_image(file, mode))


def notes_of(file, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(file)
    flaw, notes = inspect_image(str(path))
    assert flaw is None
    return notes


def pgm(levels, maxval):
    return b"P5 16 16 %d\n" % maxval + levels.astype(">u2").tobytes()


CONTAINERS = {
    "PNG": deep_png,
    "TIFF 16": lambda levels: tiff(levels.astype(np.uint16)),
    "TIFF 16 big-endian": lambda levels: tiff(levels.astype(np.uint16), order=">"),
    "TIFF 16 deflate": lambda levels: tiff(levels.astype(np.uint16), deflate=True),
    "TIFF 32": lambda levels: tiff(levels.astype(np.uint32)),
    "TIFF 32 signed": lambda levels: tiff(levels.astype(np.int32), tags=[(339, "H", [2])]),
    "PGM": lambda levels: pgm(levels, 65535),
    "Pillow I;16": lambda levels: Image.fromarray(levels[..., 0].astype(np.uint16)),
    "Pillow I;16B": lambda levels: Image.frombytes("I;16B", (16, 16), levels.astype(">u2").tobytes()),
    "Pillow I": lambda levels: Image.fromarray(levels[..., 0].astype(np.int32)),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("levels", "white"), [(RAMP, 255), (TWELVE, 4095), (SIXTEEN, 65535)])
def test_the_range_of_an_image_tells_8_12_and_16_bits(container, levels, white):
    for mode in ("L", "RGB", "RGBA"):
        expected = np.asarray(Image.fromarray(RAMP[..., 0].astype(np.uint8)).convert(mode))
        np.testing.assert_array_equal(decode(CONTAINERS[container](levels), mode), expected)


@pytest.mark.parametrize("dark", [RAMP // 2, TWELVE // 2, SIXTEEN // 2])
def test_a_dark_image_of_any_depth_stays_dark(dark):
    np.testing.assert_array_equal(decode(deep_png(dark)), RAMP[..., 0] // 2)


def test_a_note_tells_which_white_was_found(tmp_path):
    assert notes_of(deep_png(RAMP), tmp_path) == {Note.WHITE_255}
    assert notes_of(tiff(TWELVE), tmp_path) == {Note.WHITE_4095}
    assert notes_of(tiff(SIXTEEN), tmp_path) == {Note.WHITE_65535}
    assert notes_of(encode(RAMP[..., 0].astype(np.uint8)), tmp_path) == set()  # 8 bits are what they are
    assert notes_of(deep_png(RAMP * 0), tmp_path) == set()  # black is black, whatever is white


# --- declared white


@pytest.mark.parametrize(
    ("name", "encoded", "expected"),
    [
        # A dark image, whose range says less than the file: 255 of 4095 is 15.
        ("BitsPerSample 12", None, RAMP // 16),
        ("SMaxSampleValue", tiff(RAMP, tags=[(341, "H", [4095])]), RAMP // 16),
        ("MaxSampleValue", tiff(RAMP, tags=[(281, "H", [1023])]), RAMP // 4),
        ("as a float", tiff(RAMP, tags=[(341, "d", [4095.0])]), RAMP // 16),
        ("16 bits", tiff(TWELVE, tags=[(281, "H", [65535])]), TWELVE // 256),
        ("20 bits of 32", tiff(RAMP.astype(np.uint32) * 4112, tags=[(341, "I", [2**20 - 1])]), RAMP),
        ("14 bits", tiff(RAMP * 64, tags=[(281, "H", [16383])]), RAMP),
        # Values that declare nothing: the maximum of the image, less than its maximum, no number.
        ("statistics", tiff(TWELVE, tags=[(281, "H", [1944])]), RAMP),
        ("too small", tiff(TWELVE, tags=[(281, "H", [255])]), RAMP),
        ("damaged", tiff(TWELVE, tags=[(281, "s", [b"x"])]), RAMP),
        # sBIT: scaled to 16 bits, as the specification says, or not.
        ("sBIT 12 scaled", deep_png(RAMP * 16, before=chunk(b"sBIT", b"\x0c")), RAMP // 16),
        ("sBIT 12 unscaled", deep_png(RAMP, before=chunk(b"sBIT", b"\x0c")), RAMP // 16),
        ("sBIT 8 replicated", deep_png(SIXTEEN, before=chunk(b"sBIT", b"\x08")), RAMP),
        ("sBIT 16", deep_png(TWELVE, before=chunk(b"sBIT", b"\x10")), TWELVE // 256),
        ("sBIT 10 unscaled", deep_png(RAMP * 4, before=chunk(b"sBIT", b"\x0a")), None),
        ("sBIT 0", deep_png(TWELVE, before=chunk(b"sBIT", b"\0")), RAMP),
        # Pillow scales by the largest level of a PGM file itself.
        ("PGM 4095", pgm(RAMP, 4095), RAMP // 16),
        ("PGM 1000", pgm(RAMP * 3, 1000), None),
    ],
)
def test_what_a_file_declares_counts(name, encoded, expected, tmp_path):
    if name == "BitsPerSample 12":  # two levels in three bytes
        pairs = RAMP.reshape(-1, 2).astype(int)
        packed = np.stack(
            [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1
        )
        encoded = tiff(packed.astype(np.uint8).reshape(16, 24, 1), bits=12, tags=[(256, "H", [16])])
    if name == "sBIT 10 unscaled":  # the low six bits of these levels are in use
        encoded, expected = deep_png(RAMP + 500, before=chunk(b"sBIT", b"\x0a")), (RAMP + 500) // 4
    if name == "PGM 1000":
        expected = np.round(RAMP * 3 / 1000 * 65535).astype(int) // 256
    np.testing.assert_array_equal(decode(encoded), expected[..., 0])
    guessed = {"statistics", "too small", "damaged", "sBIT 0"}
    assert bool(notes_of(encoded, tmp_path)) == (name in guessed)


@pytest.mark.skipif(not features.check("jpg_2000"), reason="Pillow is built without JPEG 2000")
def test_jpeg_2000_says_its_bits():
    image = Image.fromarray(TWELVE[..., 0])
    encoded = encode(image, "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(decode(encoded), RAMP[..., 0])
    # Pillow writes no other depth. The decoder scales 12 bits to 16, so that white is 65535.
    assert jpeg2000_bits(encoded) == 16
    assert jpeg2000_bits(encoded.replace(b"\0\1\x0f\1\1", b"\0\1\x0b\1\1")) == 12


def test_white_is_zero_in_some_tiffs():
    for levels in (RAMP, TWELVE, SIXTEEN):
        for deflate in (False, True):
            encoded = tiff(levels, photometric=0, deflate=deflate)
            np.testing.assert_array_equal(decode(encoded), 255 - RAMP[..., 0])
    encoded = tiff(RAMP.astype(np.uint8), photometric=0)
    np.testing.assert_array_equal(decode(encoded), 255 - RAMP[..., 0])


# --- colour: Pillow keeps only the upper byte


@pytest.mark.parametrize("scale", [1, 16, 257])
@pytest.mark.parametrize(
    "container",
    [
        deep_png,
        tiff,
        lambda levels: tiff(levels, order=">"),
        lambda levels: tiff(levels, deflate=True),
        lambda levels: tiff(levels, deflate=True, order=">"),
        lambda levels: tiff(levels, planes=True),
        lambda levels: tiff(levels, planes=True, order=">"),
        lambda levels: b"P6 16 16 65535\n" + levels.astype(">u2").tobytes(),
    ],
    ids=["PNG", "TIFF", "big-endian", "deflate", "deflate big-endian", "planes", "planes big-endian", "PPM"],
)
def test_colours_of_8_and_12_bits_in_16_are_not_black(container, scale):
    np.testing.assert_array_equal(decode(container(COLORS * scale), "RGB"), COLORS)


@pytest.mark.parametrize("scale", [1, 16, 257])
def test_alpha_of_16_bits_is_scaled_alone(scale):
    for colors in (RAMP, COLORS):
        for alpha in (scale * RAMP, 257 * RAMP):
            found = decode(deep_png(np.concatenate([colors * scale, alpha], -1)), "RGBA")
            np.testing.assert_array_equal(found[..., :3], np.broadcast_to(colors, COLORS.shape))
            np.testing.assert_array_equal(found[..., 3], RAMP[..., 0])


def test_colours_that_pillow_has_cut_are_refused():
    unread = Image.open(io.BytesIO(deep_png(COLORS * 16)))
    with pytest.raises(
        UserError, match="16-bit levels are at most 4095, and Pillow has kept only the upper 8 bits"
    ):
        open_image(unread, "RGB")
    for scale, planes in ((16, True), (16, False)):
        encoded = tiff(COLORS * scale, planes=planes, deflate=True)
        if planes:  # libtiff gives Pillow only the upper bytes of separate planes
            with pytest.raises(UserError, match="saved as PNG"):
                open_image(encoded, "RGB")
        else:
            np.testing.assert_array_equal(decode(encoded, "RGB"), COLORS)
    np.testing.assert_array_equal(decode(tiff(COLORS * 257, planes=True, deflate=True), "RGB"), COLORS)


def test_a_turned_tiff_of_any_depth_is_upright():
    stored = np.ascontiguousarray(np.rot90(COLORS))  # as a camera stores an image with orientation 6
    for scale in (1, 16, 257):
        for deflate in (False, True):
            encoded = tiff(stored * scale, deflate=deflate, tags=[(274, "H", [6])])
            np.testing.assert_array_equal(decode(encoded, "RGB"), COLORS)
            encoded = tiff(stored[..., :1] * scale, deflate=deflate, tags=[(274, "H", [6])])
            np.testing.assert_array_equal(decode(encoded), RAMP[..., 0])


# --- palettes and transparency


def test_a_tiff_palette_of_8_bits_is_not_black():
    palette = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2])
    for scale in (1, 257):
        encoded = tiff(
            RAMP.astype(np.uint8), photometric=3, tags=[(320, "H", (palette * scale).ravel().tolist())]
        )
        np.testing.assert_array_equal(decode(encoded, "RGB"), palette.T[RAMP[..., 0]])
        opened = Image.open(io.BytesIO(encoded))
        before = opened.getpalette()
        np.testing.assert_array_equal(decode(opened, "RGB"), palette.T[RAMP[..., 0]])
        assert opened.getpalette() == before  # a user's image does not change


def test_the_transparent_level_has_the_depth_of_the_file():
    for bits, packed, levels, transparent in [
        (2, 0b00011011, [0, 85, 170, 255], 3),
        (2, 0b00011011, [0, 85, 170, 255], 1),
        (4, [0x01, 0x2F], [0, 17, 34, 255], 2),
    ]:
        rows = [[packed] if isinstance(packed, int) else packed]
        before = chunk(b"tRNS", bytes([0, transparent]))
        encoded = png(rows, bits=bits, color_type=0, width=4, before=before)
        unit = {2: 85, 4: 17}[bits]
        expected = [255 if level == transparent * unit else level for level in levels]
        np.testing.assert_array_equal(decode(encoded), [expected])
        opened = Image.open(io.BytesIO(encoded))
        np.testing.assert_array_equal(decode(opened), [expected])
        np.testing.assert_array_equal(decode(opened), [expected])  # a second time, as in a list of images
    gray = np.array([[[0], [0x8000], [0xFFFF]]])
    encoded = deep_png(gray, before=chunk(b"tRNS", b"\x80\0"))
    np.testing.assert_array_equal(decode(encoded), [[0, 255, 255]])
    color = np.array([[[0, 0, 0], [0x8000] * 3, [0x1234, 0xFFFF, 0]]])
    encoded = deep_png(color, before=chunk(b"tRNS", b"\x80\0" * 3))
    np.testing.assert_array_equal(decode(encoded, "RGB"), [[[0, 0, 0], [255] * 3, [0x12, 0xFF, 0]]])


# --- refused


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        (deep_png(np.array([[[30000], [30010]]])), "levels from 30000 to 30010 would become one level"),
        (
            tiff(np.array([[[7], [9]]], np.uint16), tags=[(281, "H", [65535])]),
            "levels from 7 to 9 would become one",
        ),
        (
            tiff(np.array([[[7], [9]]], np.uint16), tags=[(341, "H", [4095])]),
            "levels from 7 to 9 would become one",
        ),
        (tiff(np.array([[[-1], [9]]], np.int8), tags=[(339, "H", [2])]), "8-bit levels are signed"),
        (
            tiff(np.array([[[-1], [9]]], np.int32), tags=[(339, "H", [2])]),
            "int32 from -1 to 9, not 8 or 16 bits",
        ),
        (tiff(np.array([[[0], [65536]]], np.uint32)), "int32 from 0 to 65536, not 8 or 16 bits"),
        (encode(np.float32([[0, 255]]), "TIFF"), "float32 from 0.0 to 255.0, not 8 or 16 bits"),
        (encode(np.uint8([[[255] * 4, [255] * 3 + [0]]])), "white or transparent everywhere"),
        (encode(np.uint8([[[9] * 3 + [0], [200] * 3 + [0]]])), "white or transparent everywhere"),
    ],
)
def test_an_image_that_would_become_one_colour_is_refused(encoded, words):
    with pytest.raises(UserError, match=f"^the image of .* bytes cannot be used .*{words}"):
        open_image(encoded, "RGB")


def test_one_colour_stays_one_colour():
    for encoded in (
        deep_png(np.full((2, 2, 1), 30000)),
        encode(np.full((2, 2, 3), 255, np.uint8)),
        encode(np.zeros((2, 2, 4), np.uint8)),
    ):
        assert len(np.unique(decode(encoded, "RGB"))) == 1
    reds_and_greens = np.uint8([[[100, 0, 0], [0, 51, 0]]])  # both are 30 in gray
    assert np.ptp(decode(encode(reds_and_greens), "RGB")) > 0
    with pytest.raises(UserError, match="all of its colours are one level of gray"):
        open_image(encode(reds_and_greens), "L")


# --- every mode of Pillow


def test_every_mode_of_pillow_becomes_gray_colour_and_alpha():
    colors = Image.fromarray(COLORS.astype(np.uint8))
    gray = Image.fromarray(RAMP[..., 0].astype(np.uint8))
    exact = {mode: colors.convert(mode) for mode in ("RGB", "RGBX", "RGBA", "CMYK")}
    exact |= {"RGBa": colors.convert("RGBA").convert("RGBa")}
    close = {mode: colors.convert(mode) for mode in ("YCbCr", "HSV")}
    grays = {"L": gray, "LA": gray.convert("LA"), "La": gray.convert("LA").convert("La")}
    grays |= {"I": gray.convert("I"), "P": gray.convert("P"), "PA": gray.convert("P").convert("PA")}
    grays |= {mode: Image.new(mode, (16, 16), 77) for mode in ("I;16", "I;16L", "I;16B", "I;16N")}
    for mode, image in (exact | close | grays).items():
        original = colors if mode in exact or mode in close else gray
        if mode.startswith("I;"):
            original = Image.new("L", (16, 16), 77)
        for wanted in ("L", "RGB", "RGBA"):
            expected = np.asarray(original.convert(wanted)).astype(int)
            assert np.abs(decode(image, wanted) - expected).max() <= (8 if mode in close else 0), (
                mode,
                wanted,
            )
    bits = gray.convert("1")
    np.testing.assert_array_equal(decode(bits), np.where(np.asarray(bits), 255, 0))
    from PIL import ImageCms

    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = ImageCms.applyTransform(colors, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    for wanted in ("L", "RGB", "RGBA"):
        assert np.abs(decode(lab, wanted) - np.asarray(colors.convert(wanted)).astype(int)).mean() < 3


def test_read_square_has_the_same_levels_as_a_file_of_8_bits():
    options = {"channels": 1, "size_px": 16, "crop_fraction": 1.0, "interpolation": "bilinear"}
    for levels in (RAMP, TWELVE, SIXTEEN):
        np.testing.assert_array_equal(read_square(tiff(levels), **options), RAMP)
