"""Turns any image into pixels: upright, in the wanted channels, cropped to a square and resized."""

import io
import math
import os
import threading

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mlpmixer_flax import UserError

# A file, the bytes of one, a Pillow image, or a uint8 array (h, w) or (h, w, c)
ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name for such images
Box = tuple[float, float, float, float]  # left, top, right, bottom

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
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


def read_square(
    image: ImageLike, *, channels: int, size_px: int, crop_fraction: float, interpolation: str
) -> np.ndarray:
    """Returns an image as a model gets it at test time: uint8 (size_px, size_px, channels).

    It is the central square with a side of `crop_fraction` of the short side, resized. `TestBatches` does the
    same with images that vary in size.

    Raises:
      UserError: as `open_image`.
    """
    opened = open_image(image, MODES[channels])
    box = central_box(*opened.size, crop_fraction=crop_fraction)
    pixels = np.asarray(opened.resize((size_px, size_px), RESAMPLING[interpolation], box))
    return pixels.reshape(size_px, size_px, channels)


def open_image(image: ImageLike, mode: str) -> Image.Image:
    """Decodes an image, if it is not a Pillow image or an array, and converts it with `to_mode`.

    Raises:
      UserError: the file does not exist, is damaged, is not an image that Pillow can read, or is refused by
        `to_mode`; or the array is not uint8 (h, w) or (h, w, c) with 1, 3 or 4 channels.
    """
    if isinstance(image, np.ndarray):
        return to_mode(_from_array(image), mode)
    try:
        if isinstance(image, Image.Image):
            # Pillow may not have read its file yet, and two threads must not read the same file.
            with _ONE_AT_A_TIME:
                return to_mode(image, mode)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return to_mode(opened, mode)
    except Exception as error:
        raise UserError(
            f"{_describe(image)} cannot be used ({_flaw(error)}): repair it or give another"
        ) from error


def _from_array(array: np.ndarray) -> Image.Image:
    gray = array.ndim == 2 or array.shape[2:] == (1,)
    if array.dtype != np.uint8 or not array.size or not (gray or array.shape[2:] in ((3,), (4,))):
        raise UserError(
            f"an array {array.dtype} {array.shape} is not an image: give uint8 (h, w) or (h, w, c) with 1, 3 or "
            "4 channels"
        )
    return Image.fromarray(array.reshape(array.shape[:2]) if gray else array)


def _describe(image: object) -> str:
    if isinstance(image, bytes):
        return f"the image of {len(image)} bytes"
    if isinstance(image, Image.Image):
        return f"the Pillow image of {image.width}x{image.height} px"
    return f"image {os.fspath(image)!r}" if isinstance(image, (str, os.PathLike)) else f"image {image!r:.50}"


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Turns an opened image upright, as its EXIF data says, and converts it to mode "L", "RGB" or "RGBA".

    If the mode has no alpha channel, transparent parts show white. Of 16 bits the upper eight are kept,
    whatever range the image uses. Of an animation the first frame is used. Colour profiles are not applied.

    Raises:
      ValueError: the image has no pixels; or the values are floating-point or need more than 16 bits, so
        which is white is unknown.
      Exception: the data is damaged; Pillow raises exceptions of many classes.
    """
    if 0 in image.size:
        raise ValueError("it has no pixels")
    image.load()  # first: Pillow turns a TIFF upright here, and a PNG may have its EXIF data at the end
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":  # includes I;16 and I;16B; Pillow would clip all of them at 255
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its values are {values.dtype} from {values.min()} to {values.max()}, "
                "not 8 or 16 bits per channel"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if mode != "RGBA" and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def central_box(width: int, height: int, *, crop_fraction: float) -> Box:
    """Returns the central square with a side of `crop_fraction` of the short side.

    Resizing this box to s equals resizing the short side to s / crop_fraction and cropping the centre.
    """
    side = min(width, height) * crop_fraction
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, *, min_crop_area: float, rng: np.random.Generator) -> Box | None:
    """Draws the box of an Inception crop: at least `min_crop_area` of the area, sides from 3:4 to 4:3.

    Returns None if ten draws do not fit in the image.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_crop_area, 1)
        aspect = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return None


def find_flaw(file: str) -> str | None:
    """Returns why an image file cannot be used, or None if no flaw is found; reads the whole file.

    Finds files that are empty, cut short, not an image, too large for Pillow (179 megapixels) or refused by
    `to_mode`. Does not find damage that leaves a valid file, such as changed bits in a JPEG.
    """
    try:
        with Image.open(file) as image:
            # Pillow still reads a JPEG to its end, but decodes it at an eighth of its size. This takes a
            # third to half of the time, or four fifths for a progressive JPEG.
            image.draft("L", (1, 1))
            to_mode(image, "RGB")
    except Exception as error:
        return _flaw(error)
    return None


def _flaw(error: Exception) -> str:
    # Pillow's own message contains the address of a buffer.
    unknown = isinstance(error, UnidentifiedImageError)
    return "empty, cut short or not an image that Pillow can read" if unknown else first_line(error)


def first_line(error: Exception) -> str:
    """Returns the class of an exception and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
