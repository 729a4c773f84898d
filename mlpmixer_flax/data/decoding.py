"""Decodes an image: upright, with 8 bits per channel, in the wanted channels, also if its metadata is damaged."""

import contextlib
import io
import os
import re
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mlpmixer_flax import UserError
from mlpmixer_flax.data import levels
from mlpmixer_flax.data.files import ForeignFile, explain, pixel_formats
from mlpmixer_flax.data.notes import Note
from mlpmixer_flax.reading import open_file

# A file, the bytes of one, a Pillow image, or a uint8 array (h, w) or (h, w, c)
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

_UPRIGHT = {  # EXIF orientation -> the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGEST_BYTES = 2**30  # of a file: 179 megapixels, the most that Pillow decodes, in colour with 16 bits
_ONE_AT_A_TIME = threading.Lock()
_ONE_LARGE = threading.Lock()

_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND"}
# The tags of TIFF 6.0 and libtiff that say how pixels are stored, and which level is white.
_TIFF_PIXELS = {
    *range(254, 263), 266, 273, *range(277, 282), 284, 292, 293, *range(317, 326), *range(332, 348), *range(512, 533)
}  # fmt: skip
_TIFF_ORIENTATION = 274


def decode(image: ImageLike, mode: str, *, draft: bool = False) -> tuple[Image.Image, set[Note]]:
    """Returns an image turned upright, as its EXIF data says, in mode "L", "RGB" or "RGBA"; and notes on it.

    If the mode has no alpha channel, transparent parts show white. `levels.load` says what becomes of more than
    8 bits per channel. Of an animation the first frame is used. Colour profiles are not applied. Metadata that
    is damaged is ignored; if the orientation cannot be read, the image is upright as it is stored.

    Args:
      draft: decodes a JPEG at an eighth of its size, to check it fast.

    Raises:
      ValueError: the image has no pixels; or as `levels.load`; or the image would become one colour, although
        it has more: white on transparent, or colours that are one level of gray.
      Exception: the data is damaged; Pillow raises exceptions of many classes.
    """
    if isinstance(image, np.ndarray):
        return _convert(_from_array(image), mode, None)
    if isinstance(image, Image.Image):
        # Pillow may not have read its file yet, and two threads must not read the same file.
        with _ONE_AT_A_TIME:
            return _convert(image, mode, None)
    data = image if isinstance(image, bytes) else _read(image)
    try:
        return _decode(data, mode, draft)
    except MemoryError:
        raise
    except Exception:
        for bare in _without_metadata(data):
            try:
                decoded, notes = _decode(bare, mode, draft)
            except MemoryError:
                raise
            except Exception:
                continue
            return decoded, notes | {Note.METADATA}
        raise


def _read(file: str | os.PathLike) -> bytes:
    with open_file(os.path.expanduser(file)) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _LARGEST_BYTES:
            raise ForeignFile(
                explain(opened.read(2**16))  # it may be a video or an archive
                or f"it has {size:,} bytes, more than the {_LARGEST_BYTES:,} that are read: save it as JPEG or PNG"
            )
        return opened.read()


def _decode(data: bytes, mode: str, draft: bool) -> tuple[Image.Image, set[Note]]:
    with _open(data) as image, _alone_if_large(image):
        if draft:
            # Pillow still reads a JPEG to its end, but decodes it at an eighth of its size. This takes a
            # third to half of the time, or four fifths for a progressive JPEG.
            image.draft("L", (1, 1))
        return _convert(image, mode, data)


def _alone_if_large(image: Image.Image) -> contextlib.AbstractContextManager[Any]:
    """Lets only one thread at a time decode an image of more than 33 megapixels, which may need over a gigabyte."""
    return _ONE_LARGE if image.width * image.height > 2**25 else contextlib.nullcontext()


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=pixel_formats())
    except UnidentifiedImageError:
        if explanation := explain(data):
            raise ForeignFile(explanation) from None
        raise


def _from_array(array: np.ndarray) -> Image.Image:
    gray = array.ndim == 2 or array.shape[2:] == (1,)
    if array.dtype != np.uint8 or not array.size or not (gray or array.shape[2:] in ((3,), (4,))):
        hint = ", for example (255 * array).round().astype('uint8')" if array.dtype.kind == "f" else ""
        raise UserError(
            f"an array {array.dtype} {array.shape} is not an image: give uint8 (h, w) or (h, w, c) with 1, 3 or "
            f"4 channels{hint}"
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if gray else array)


def _convert(image: Image.Image, mode: str, data: bytes | None) -> tuple[Image.Image, set[Note]]:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    # First: Pillow turns a TIFF upright here, and a PNG may have its EXIF data at the end.
    found, note = levels.load(image, data)
    turn, damaged = _read_orientation(image)
    notes = ({note} if note else set()) | ({Note.METADATA} if damaged else set())
    if turn is not None:
        found = found.transpose(turn)
    if found.mode in ("La", "LAB"):
        found = found.convert({"La": "LA", "LAB": "RGB"}[found.mode])  # they convert to no other mode
    opaque = found
    if mode != "RGBA" and found.has_transparency_data:
        found = found.convert("RGBA")
        opaque = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found)
        _check_same(found, opaque, "it is white or transparent everywhere: save it on a background")
    converted = opaque if opaque.mode == mode else opaque.convert(mode)
    if mode == "L":
        _check_same(opaque, converted, "all of its colours are one level of gray: use a model for colour")
    return converted, notes


def _read_orientation(image: Image.Image) -> tuple[Image.Transpose | None, bool]:
    """Returns the operation that turns an image upright, None for none, and whether its EXIF data is damaged."""
    try:
        exif = image.getexif()
        turn = _UPRIGHT.get(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None, True
    stored = image.info.get("exif")
    stored = stored.removeprefix(b"Exif\0\0") if isinstance(stored, bytes) else b""
    # Pillow says nothing about some damage. A header without entries is empty, but whole.
    unread = not exif and (stored[:4] not in (b"", b"II*\0", b"MM\0*") or len(stored.rstrip(b"\0")) > 8)
    return turn, unread


def _check_same(before: Image.Image, after: Image.Image, flaw: str) -> None:
    """Raises ValueError with this message if an image has become one colour and had more."""
    if before is not after and after.getcolors(1) is not None and before.getcolors(1) is None:
        raise ValueError(flaw)


# --- damaged metadata around whole pixels


def _without_metadata(data: bytes) -> Iterator[bytes]:
    """Yields the file with its EXIF data but without other metadata, then without both.

    Pillow refuses a file if a text chunk is too large or a tag is damaged, although the pixels are whole. This
    knows PNG, JPEG, TIFF and AVIF, and yields nothing for other formats.
    """
    for keep_exif in (True, False):
        if data.startswith(levels.PNG):
            yield _bare_png(data, keep_exif)
        elif data.startswith(b"\xff\xd8"):
            yield _bare_jpeg(data, keep_exif)
        elif data[:4] in (b"II*\0", b"MM\0*"):
            yield _bare_tiff(data, keep_exif)
        elif data[4:12] in (b"ftypavif", b"ftypavis") and not keep_exif:
            # The decoder does not look for the EXIF item under an unknown type.
            yield re.sub(rb"(infe[\2\3].{3}.{4,6})Exif", rb"\1skip", data, flags=re.DOTALL)


def _bare_png(data: bytes, keep_exif: bool) -> bytes:
    kept, at = [levels.PNG], len(levels.PNG)
    for kind, content in levels.png_chunks(data):
        chunk = data[at : at + len(content) + 12]
        at += len(chunk)
        whole = chunk[-4:] == zlib.crc32(kind + content).to_bytes(4)
        if kind in _PNG_PIXELS or (keep_exif and kind == b"eXIf" and whole):
            kept.append(chunk)
    return b"".join(kept)


def _bare_jpeg(data: bytes, keep_exif: bool) -> bytes:
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):  # up to the pixels
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4]) + 2
        segment = data[at : at + length]
        at += length
        is_metadata = 0xE0 <= kind <= 0xEF or kind == 0xFE
        # JFIF and Adobe say how colours are stored; libjpeg ignores those that are shorter than this.
        colours = (kind == 0xE0 and len(segment) >= 18) or (kind == 0xEE and len(segment) >= 16)
        exif = keep_exif and kind == 0xE1 and segment[4:10] == b"Exif\0\0"
        if not is_metadata or colours or exif:
            kept.append(segment)
    return b"".join([*kept, data[at:]])


def _bare_tiff(data: bytes, keep_exif: bool) -> bytes:
    """Returns the file with only the needed tags in its first directory, which stays where it is."""
    byteorder = "little" if data[:2] == b"II" else "big"
    at = int.from_bytes(data[4:8], byteorder)
    count = int.from_bytes(data[at : at + 2], byteorder)
    needed = _TIFF_PIXELS | ({_TIFF_ORIENTATION} if keep_exif else set())
    end = at + 2 + 12 * count
    entries = [data[start : start + 12] for start in range(at + 2, end, 12)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], byteorder) in needed]
    directory = len(kept).to_bytes(2, byteorder) + b"".join(kept)
    # The end of a directory is the address of the next one: 0, for none.
    return data[:at] + directory.ljust(end + 4 - at, b"\0") + data[end + 4 :]
