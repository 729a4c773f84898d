"""Decides which level of an image is white, where channels have more than 8 bits, and scales them to 8."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlpmixer_flax.data import deep
from mlpmixer_flax.data.notes import WHITES, Note
from mlpmixer_flax.data.rescue import png_chunks

# Tags of TIFF
_BITS_PER_SAMPLE, _PHOTOMETRIC, _COLOR_MAP, _SAMPLE_FORMAT = 258, 262, 320, 339
_LARGEST_LEVEL = (341, 281)  # SMaxSampleValue and MaxSampleValue
_TAGS = (_BITS_PER_SAMPLE, _PHOTOMETRIC, _COLOR_MAP, _SAMPLE_FORMAT, *_LARGEST_LEVEL)
_POWERS = {2**bits - 1 for bits in range(8, 32)}


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
    tags = {tag: deep.tags_of(image)[tag] for tag in _TAGS if tag in deep.tags_of(image)}
    deep.repair_planes(image)
    _scale_transparency(image)
    shortened, declared = deep.is_shortened(image, data), _declared_white(image, tags, data)
    image.load()
    if 2 in tags.get(_SAMPLE_FORMAT, ()) and image.mode == "L":
        raise ValueError(
            "its 8-bit levels are signed, so it is unknown which is white: save it without signs"
        )
    if image.mode[0] in "IF":
        mode, values = "L", np.asarray(image)[..., None]
    elif shortened and ((declared or 65535) < 65535 or _brightest(image) <= 16):
        mode, values = deep.read_whole(data)
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
    if image.format == "PPM" and deep.tiles_of(image):
        arguments = deep.tiles_of(image)[0][3]  # (layout, largest level), or the layout alone for 65535
        if isinstance(arguments, tuple) and arguments[-1] < 65535:
            return 65535  # Pillow scales the levels to this
    if image.format == "JPEG2000" and deep.jpeg2000_bits(data) < 16:
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
    level, name = image.info.get("transparency"), deep.layout(image)
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
