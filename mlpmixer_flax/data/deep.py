"""Reads images of 16 bits per channel whole, where Pillow keeps only the upper byte of each channel."""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFile

# Pillow's names of such layouts. CMYK is not among them: an almost white page has low levels of every ink.
_SHORTENED = re.compile(r"(L|RGB|RGBX|RGBA|RGBa|LA|[RGBA]);16[BLN]")
_BITS_PER_SAMPLE, _PLANAR = 258, 284  # tags of TIFF


def repair_planes(image: Image.Image) -> None:
    """Corrects how Pillow will decode a TIFF file with separate planes of 16 bits: it takes them for 8 bits."""
    tags = tags_of(image)
    if tags.get(_PLANAR) == 2 and max(tags.get(_BITS_PER_SAMPLE, (1,))) == 16:
        order = "L" if getattr(tags, "prefix", b"") == b"II" else "B"
        for number, tile in enumerate(tiles_of(image)):
            name, *others = tile.args
            if name in ("R", "G", "B", "A"):
                tiles_of(image)[number] = tile._replace(args=(f"{name};16{order}", *others))


def is_shortened(image: Image.Image, data: bytes | None) -> bool:
    """Returns whether Pillow will keep only the upper byte of each channel of an image not yet decoded."""
    codec, _, _, arguments = (tiles_of(image) or [("", (), 0, "")])[0]
    if codec == "jpeg2k":
        return image.mode != "I;16" and jpeg2000_bits(data) == 16
    if codec == "ppm":
        return arguments == ("RGB", 65535)
    return codec == "SGI16" or _SHORTENED.fullmatch(layout(image)) is not None


def read_whole(data: bytes | None) -> tuple[str, np.ndarray]:
    """Returns the mode and the levels, uint16 (h, w, c), of a file for which `is_shortened` is true.

    Raises:
      ValueError: there is no file, or Pillow cannot give the lower bytes of this format.
    """
    if data is not None:
        with Image.open(io.BytesIO(data)) as image:
            codec, name, mode = tiles_of(image)[0][0], layout(image), image.mode
            planes = codec == "libtiff" and tags_of(image).get(_PLANAR) == 2
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


def tags_of(image: Image.Image) -> Mapping[int, Any]:
    """Returns the tags of a TIFF file; none for other images."""
    return getattr(image, "tag_v2", {})


def tiles_of(image: Image.Image) -> list[Any]:
    """Returns Pillow's list of (codec, box, offset, arguments) for the pixels; empty if they are decoded."""
    return getattr(image, "tile", [])


def layout(image: Image.Image) -> str:
    """Returns Pillow's name for how the pixels of an image are stored, such as "RGB;16B"; "" if it is decoded."""
    arguments = tiles_of(image)[0][3] if tiles_of(image) else ""
    name = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return name if isinstance(name, str) else ""


def jpeg2000_bits(data: bytes | None) -> int:
    """Returns the bits per channel of a JPEG 2000 file; 16 if it does not say."""
    start = (data or b"").find(b"\xff\x4f\xff\x51")  # of the codestream, which begins with its SIZ segment
    return (data[start + 42] & 0x7F) + 1 if data and 0 <= start < len(data) - 42 else 16


def _decode(data: bytes, part: str) -> np.ndarray:
    """Decodes the "upper" or "lower" byte of each channel, or all bytes in a layout with this name."""
    with Image.open(io.BytesIO(data)) as image:
        repair_planes(image)
        tiles_of(image)[:] = [_with_layout(tile, part) for tile in tiles_of(image)]
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
