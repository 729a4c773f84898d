"""Decodes an image: upright, with 8 bits per channel, in the wanted channels."""

import io
import os
import threading

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mlpmixer_flax import UserError
from mlpmixer_flax.data import foreign, levels
from mlpmixer_flax.data.notes import Note
from mlpmixer_flax.data.rescue import without_metadata

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
_ONE_AT_A_TIME = threading.Lock()


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
    except Exception:
        for bare in without_metadata(data):
            try:
                decoded, notes = _decode(bare, mode, draft)
            except Exception:
                continue
            return decoded, notes | {Note.METADATA}
        raise


def _read(file: str | os.PathLike) -> bytes:
    with open(os.path.expanduser(file), "rb") as opened:
        head = opened.read(2**16)
        if os.fstat(opened.fileno()).st_size > 2**28 and foreign.explain(head):
            return head  # enough to refuse a long video or archive
        return head + opened.read()


def _decode(data: bytes, mode: str, draft: bool) -> tuple[Image.Image, set[Note]]:
    with _open(data) as image:
        if draft:
            # Pillow still reads a JPEG to its end, but decodes it at an eighth of its size. This takes a
            # third to half of the time, or four fifths for a progressive JPEG.
            image.draft("L", (1, 1))
        return _convert(image, mode, data)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        explanation = foreign.explain(data)
        if explanation and "HEIC" in explanation and foreign.read_heic():
            return Image.open(io.BytesIO(data))
        if explanation:
            raise foreign.ForeignFile(explanation) from None
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
