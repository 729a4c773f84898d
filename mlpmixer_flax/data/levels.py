"""Scales images with more than 8 bits per channel to 8: which level is white, and the bits that Pillow drops."""

import io
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from mlpmixer_flax.data.files import pixel_formats
from mlpmixer_flax.data.notes import WHITES, Note

PNG = b"\x89PNG\r\n\x1a\n"  # the beginning of such a file
# Tags of TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _COLOR_MAP, _SAMPLE_FORMAT = 258, 262, 284, 320, 339
_LARGEST_LEVEL = (341, 281)  # SMaxSampleValue and MaxSampleValue
_TAGS = (_BITS_PER_SAMPLE, _PHOTOMETRIC, _COLOR_MAP, _SAMPLE_FORMAT, *_LARGEST_LEVEL)
_POWERS = {2**bits - 1 for bits in range(8, 32)}
# Pillow's names of layouts of which it keeps only the upper byte of each channel. CMYK is not among them: an almost
# white page has low levels of every ink.
_SHORTENED = re.compile(r"(L|RGB|RGBX|RGBA|RGBa|LA|[RGBA]);16[BLN]")


def load(image: Image.Image, data: bytes | None) -> tuple[Image.Image, Note | None]:
    """Decodes an image that Pillow has opened; returns it with 8 bits per channel, and a note on a guess.

    Of more bits, the upper 8 below white are kept. White is the level that the file declares: by the bits per
    sample or the largest level in TIFF, by sBIT in PNG, by the bits in JPEG 2000, by the largest level in PGM.
    Most files of 16 or 32 bits declare nothing. White is then 255, 4095 or 65535: the smallest that no level of
    this image is above. This gives an image the same levels alone and in any folder. But an image so dark that
    no level is above a 16th of white, 255 of 4095 or 4095 of 65535, comes out 16 times too bright beside others
    of its camera; `notes.summarize` says so if the images of a folder differ in white.

    Args:
      data: the file of the image, None if there is none.

    Raises:
      ValueError: white is unknown, because levels are floating-point, negative or above 65535; or several
        levels would become one.
      Exception: the data is damaged; Pillow raises exceptions of many classes.
    """
    tags = {tag: _tags_of(image)[tag] for tag in _TAGS if tag in _tags_of(image)}
    _repair_planes(image)
    _scale_transparency(image)
    shortened, declared = _is_shortened(image, data), _declared_white(image, tags, data)
    image.load()
    if 2 in tags.get(_SAMPLE_FORMAT, ()) and image.mode == "L":
        raise ValueError(
            "its 8-bit levels are signed, so it is unknown which is white: save it without signs"
        )
    if image.mode[0] in "IF":
        mode, values = "L", np.asarray(image)[..., None]
    elif shortened and ((declared or 65535) < 65535 or _brightest(image) <= 16):
        mode, values = _read_whole(data)
    else:
        return _with_whole_palette(image, tags), None
    color, alpha = (values[..., :-1], values[..., -1:]) if mode.endswith("A") else (values, values[..., :0])
    white, note = _find_white(color, declared, data)
    shift = white.bit_length() - 8
    levels = color >> shift
    if levels.min() == levels.max() and color.min() != color.max():
        raise ValueError(
            f"its levels from {color.min()} to {color.max()} would become one level of 8 bits: save it with 8 bits"
        )
    if image.mode == "I;16" and tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow inverts only 8 bits
        levels = 255 - levels
    alpha = alpha >> (shift if alpha.max(initial=0) <= white else 8)
    levels = np.concatenate([levels, alpha], -1).astype(np.uint8)
    found = Image.frombytes(mode, image.size, levels.tobytes())
    if isinstance(image.info.get("transparency"), int):
        found.info["transparency"] = image.info["transparency"] >> shift
    return found, note


def _find_white(values: np.ndarray, declared: int | None, data: bytes | None) -> tuple[int, Note | None]:
    """Returns the level that is white, and a note if the image does not declare it."""
    low, high, bits = values.min(), values.max(), _significant_bits(data)
    unknown = f"its values are {values.dtype} from {low} to {high}, not 8 or 16 bits per channel"
    if values.dtype.kind == "f" or low < 0:
        raise ValueError(unknown)
    if bits:
        # The specification of PNG wants such levels scaled to 16 bits, but some writers do not scale them.
        unscaled = high < 2**bits and (values % 2 ** (16 - bits)).any()
        declared = 2**bits - 1 if unscaled else 65535
    if declared and high <= declared:
        return declared, None
    if high > 65535:
        raise ValueError(unknown)
    white = min(white for white in WHITES if high <= white)
    return white, WHITES[white] if high else None


def _declared_white(image: Image.Image, tags: Mapping[int, Any], data: bytes | None) -> int | None:
    """Returns the level that a file declares as white, except by sBIT; None if it declares none."""
    if image.format == "TIFF":
        bits = max(tags.get(_BITS_PER_SAMPLE, (1,)))
        if 8 < bits < 16:
            return 2**bits - 1
        for tag in _LARGEST_LEVEL:
            level = max((value for value in tags.get(tag, ()) if isinstance(value, (int, float))), default=0)
            # Some writers put the largest level of the image here, which is rarely 2^n - 1.
            if level in _POWERS:
                return int(level)
    if image.format == "PPM" and _tiles_of(image):
        arguments = _tiles_of(image)[0][3]  # (layout, largest level), or the layout alone for 65535
        if isinstance(arguments, tuple) and arguments[-1] < 65535:
            return 65535  # Pillow scales the levels to this
    if image.format == "JPEG2000" and jpeg2000_bits(data) < 16:
        return 65535  # as above
    return None


def _significant_bits(data: bytes | None) -> int:
    """Returns the bits per colour that a PNG file of 16 bits declares; 0 if it declares none."""
    for kind, content in png_chunks(data or b""):
        if kind == b"sBIT":
            bits = max(content[: 3 if len(content) >= 3 else 1], default=0)
            return bits if 8 <= bits <= 16 else 0
        if kind == b"IDAT":
            break
    return 0


def _brightest(image: Image.Image) -> int:
    """Returns the highest level of all channels except alpha."""
    channels = [image.getchannel(name) for name in image.getbands() if name != "A"]
    return max(np.asarray(channel).max() for channel in channels)


def _scale_transparency(image: Image.Image) -> None:
    """Scales what a PNG file declares as transparent as Pillow will scale the levels of the image."""
    level, name = image.info.get("transparency"), _layout(image)
    if name == "RGB;16B" and isinstance(level, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in level)
    elif name in ("L;2", "L;4") and isinstance(level, int):
        image.info["transparency"] = level * {"L;2": 85, "L;4": 17}[name]


def _with_whole_palette(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Repairs the colours of a TIFF palette: they have 16 bits, but some writers store 8 there."""
    colors = np.asarray(tags.get(_COLOR_MAP, 0))
    if image.mode == "P" and 0 < colors.max() < 256:
        image = image.copy()  # a user's image stays as it is
        image.putpalette(colors.reshape(3, -1).T.astype(np.uint8).tobytes())
    return image


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the type and the content of each chunk of a PNG file; the last one may be cut short."""
    at = len(PNG)
    while data.startswith(PNG) and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length]
        at += length + 12


# --- Pillow keeps only the upper byte of the channels of many images with 16 bits


def _repair_planes(image: Image.Image) -> None:
    """Corrects how Pillow will decode a TIFF file with separate planes of 16 bits: it takes them for 8 bits."""
    tags = _tags_of(image)
    if tags.get(_PLANAR) == 2 and max(tags.get(_BITS_PER_SAMPLE, (1,))) == 16:
        order = "L" if getattr(tags, "prefix", b"") == b"II" else "B"
        for number, tile in enumerate(_tiles_of(image)):
            name, *others = tile.args
            if name in ("R", "G", "B", "A"):
                _tiles_of(image)[number] = tile._replace(args=(f"{name};16{order}", *others))


def _is_shortened(image: Image.Image, data: bytes | None) -> bool:
    """Returns whether Pillow will keep only the upper byte of each channel of an image not yet decoded."""
    codec, _, _, arguments = (_tiles_of(image) or [("", (), 0, "")])[0]
    if codec == "jpeg2k":
        return image.mode != "I;16" and jpeg2000_bits(data) == 16
    if codec == "ppm":
        return arguments == ("RGB", 65535)
    return codec == "SGI16" or _SHORTENED.fullmatch(_layout(image)) is not None


def _read_whole(data: bytes | None) -> tuple[str, np.ndarray]:
    """Returns the mode and the levels, uint16 (h, w, c), of a file for which `_is_shortened` is true.

    Raises:
      ValueError: there is no file, or Pillow cannot give the lower bytes of this format.
    """
    if data is not None:
        with Image.open(io.BytesIO(data), formats=pixel_formats()) as image:
            codec, name, mode = _tiles_of(image)[0][0], _layout(image), image.mode
            planes = codec == "libtiff" and _tags_of(image).get(_PLANAR) == 2
        if name == "LA;16B":  # four bytes per pixel, which Pillow can also take for four channels
            return "LA", np.ascontiguousarray(_decode(data, "RGBA")).view(">u2")
        if codec in ("zip", "raw", "ppm", "libtiff") and not name.startswith("RGBa") and not planes:
            upper, lower = (_decode(data, byte).astype(np.uint16) for byte in ("upper", "lower"))
            values = upper << 8 | lower
            return mode, values.reshape(*values.shape[:2], -1)
    raise ValueError(
        "its 16-bit levels are at most 4095, and Pillow has kept only the upper 8 bits: give the file itself, "
        "saved as PNG"
    )


def _tags_of(image: Image.Image) -> Mapping[int, Any]:
    """Returns the tags of a TIFF file; none for other images."""
    return getattr(image, "tag_v2", {})


def _tiles_of(image: Image.Image) -> list[Any]:
    """Returns Pillow's list of (codec, box, offset, arguments) for the pixels; empty if they are decoded."""
    return getattr(image, "tile", [])


def _layout(image: Image.Image) -> str:
    """Returns Pillow's name for how the pixels of an image are stored, such as "RGB;16B"; "" if it is decoded."""
    arguments = _tiles_of(image)[0][3] if _tiles_of(image) else ""
    name = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return name if isinstance(name, str) else ""


def jpeg2000_bits(data: bytes | None) -> int:
    """Returns the bits per channel of a JPEG 2000 file; 16 if it does not say."""
    start = (data or b"").find(b"\xff\x4f\xff\x51")  # of the codestream, which begins with its SIZ segment
    return (data[start + 42] & 0x7F) + 1 if data and 0 <= start < len(data) - 42 else 16


def _decode(data: bytes, part: str) -> np.ndarray:
    """Decodes the "upper" or "lower" byte of each channel, or all bytes in a layout with this name."""
    with Image.open(io.BytesIO(data), formats=pixel_formats()) as image:
        _repair_planes(image)
        _tiles_of(image)[:] = [_with_layout(tile, part) for tile in _tiles_of(image)]
        return np.asarray(image)


def _with_layout(tile: ImageFile._Tile, part: str) -> ImageFile._Tile:
    if tile.codec_name == "ppm":
        tile = tile._replace(codec_name="raw", args="RGB;16B")
    name, *others = (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)
    if part == "lower":  # the upper one in the other byte order; N is the machine's, L wherever JAX runs
        name = name[:-1] + ("L" if name.endswith("B") else "B")
    elif part != "upper":
        name = part
    return tile._replace(args=(name, *others) if others else name)
