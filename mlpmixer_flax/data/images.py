"""Turns any image into pixels: opened, or refused in a sentence, and made square."""

import math
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from mlpmixer_flax import UserError
from mlpmixer_flax.data.decoding import ImageLike, decode
from mlpmixer_flax.data.files import ForeignFile
from mlpmixer_flax.data.notes import Note, say_once
from mlpmixer_flax.faults import first_line, pass_on

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name for such images
FITS = ("crop", "pad", "stretch")  # how an image becomes a square, see `to_square`
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Box = tuple[float, float, float, float]  # left, top, right, bottom

_GRAY = {"L": 128, "RGB": (128, 128, 128), "RGBA": (128, 128, 128, 255)}

# --- opening


def read_square(
    image: ImageLike,
    *,
    channels: int,
    size_px: int,
    crop_fraction: float,
    interpolation: str,
    fit: str = "crop",
) -> np.ndarray:
    """Returns an image as a model gets it at test time: uint8 (size_px, size_px, channels).

    `to_square` makes the square. `TestBatches` does the same with images that vary in size.

    Raises:
      UserError: as `open_image`.
    """
    opened = open_image(image, MODES[channels])
    square = to_square(opened, size_px, fit=fit, crop_fraction=crop_fraction, interpolation=interpolation)
    return np.asarray(square).reshape(size_px, size_px, channels)


def open_image(image: ImageLike, mode: str) -> Image.Image:
    """Returns an image in `mode`, as `decode`; says once on stderr if something about it is odd.

    Raises:
      UserError: the file does not exist, is damaged, is not an image that Pillow can read, or is refused by
        `decode`; or the array is not uint8 (h, w) or (h, w, c) with 1, 3 or 4 channels.
      Exception: as `flaw_of`.
    """
    try:
        decoded, notes = decode(image, mode)
    except UserError:
        raise
    except Exception as error:
        name, remedy = _describe(image), "repair it or give another"
        flaw = flaw_of(error, name, image if isinstance(image, (str, os.PathLike)) else None)
        if isinstance(error, ForeignFile):
            raise UserError(f"{name} cannot be used: {error}") from error
        if not isinstance(image, (str, bytes, os.PathLike, Image.Image)):
            remedy = "give a file, its bytes, a Pillow image or a uint8 NumPy array"
        raise UserError(f"{name} cannot be used ({flaw}): {remedy}") from error
    say_once(notes, _describe(image))
    return decoded


def inspect_image(file: str) -> tuple[str | None, set[Note]]:
    """Returns why an image file cannot be used (None if no flaw is found), and notes; reads the whole file.

    Finds files that are empty, cut short, not an image, too large for Pillow (179 megapixels) or refused by
    `decode`. Does not find damage that leaves a valid file, such as changed bits in a JPEG.

    Raises:
      Exception: as `flaw_of`.
    """
    try:
        return None, decode(file, "RGB", draft=True)[1]
    except Exception as error:
        return flaw_of(error, f"image {file!r}", file), set()


def flaw_of(error: Exception, name: str, file: str | os.PathLike[str] | None = None) -> str:
    """Returns in one line why an image cannot be used, from the exception of `decode`.

    Args:
      name, file: of the image, for messages.

    Raises:
      Exception: as `faults.pass_on`, if not the image but memory, the disk or a permission is at fault.
    """
    if isinstance(error, MemoryError):
        error.add_note(f"it was needed for {name}")
    pass_on(error, file)
    if isinstance(error, ForeignFile):
        return str(error)
    # Pillow's own message contains the address of a buffer.
    unknown = isinstance(error, UnidentifiedImageError)
    return "empty, cut short or not an image that Pillow can read" if unknown else first_line(error)


def _describe(image: ImageLike) -> str:
    if isinstance(image, bytes):
        return f"the image of {len(image)} bytes"
    if isinstance(image, Image.Image):
        return f"the Pillow image of {image.width}x{image.height} px"
    if isinstance(image, np.ndarray):
        return f"the array {image.dtype} {image.shape}"
    if isinstance(image, (str, os.PathLike)):
        return f"image {os.fspath(image)!r}"
    return f"image {' '.join(repr(image).split()):.50}"


# --- squares


def to_square(
    image: Image.Image,
    size_px: int,
    *,
    fit: str,
    crop_fraction: float,
    interpolation: str,
    min_crop_area: float = 1.0,
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """Returns a square of an image, resized to `size_px`.

    Args:
      fit: "crop": a central square with a side of `crop_fraction` of the short side. "stretch": the middle of
        the image, `crop_fraction` of each side, without its aspect ratio. "pad": the same middle in its aspect
        ratio, with gray (level 128) beside it. A square image gives the same square in all three ways.
      min_crop_area, rng: if `min_crop_area` is below 1 and `rng` is given, a box for training is drawn, of at
        least this share of the area.
    """
    resampling = RESAMPLING[interpolation]
    box = _choose_box(*image.size, fit=fit, crop_fraction=crop_fraction, min_crop_area=min_crop_area, rng=rng)
    if fit != "pad":
        return image.resize((size_px, size_px), resampling, box)
    sides = box[2] - box[0], box[3] - box[1]
    width, height = (max(1, round(side * size_px / max(sides))) for side in sides)
    square = Image.new(image.mode, (size_px, size_px), _GRAY[image.mode])
    square.paste(
        image.resize((width, height), resampling, box), ((size_px - width) // 2, (size_px - height) // 2)
    )
    return square


def _choose_box(
    width: int,
    height: int,
    *,
    fit: str,
    crop_fraction: float,
    min_crop_area: float,
    rng: np.random.Generator | None,
) -> Box:
    # For "pad" and "stretch" the box is chosen in a square, which then takes the shape of the image.
    w, h = (width, height) if fit == "crop" else (max(width, height),) * 2
    box = None
    if rng is not None and min_crop_area < 1:
        box = random_box(w, h, min_crop_area=min_crop_area, rng=rng)
        if box is None and max(w, h) > 2 * min(w, h):
            # A central box would never show the ends. In photos that are not as wide it stays.
            side = min(w, h)
            left, top = int(rng.integers(w - side + 1)), int(rng.integers(h - side + 1))
            box = left, top, left + side, top + side
    left, top, right, bottom = box or central_box(w, h, crop_fraction=crop_fraction)
    x, y = width / w, height / h
    return left * x, top * y, right * x, bottom * y


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
