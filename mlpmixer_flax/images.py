"""Any image file as pixels: upright, in as many channels as wanted, cropped to a square and resized."""

import io
import math
import os

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mlpmixer_flax import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name for such images
Box = tuple[float, float, float, float]  # left, top, right, bottom

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_square(
    file: str | os.PathLike | bytes, *, channels: int, size_px: int, crop_fraction: float, interpolation: str
) -> np.ndarray:
    """An image as a model sees it at test time: uint8 (size_px, size_px, channels); UserError as open_image.

    It is the central square of `crop_fraction` of the short side, resized: as TestBatches does with images that vary
    in size.
    """
    image = open_image(file, MODES[channels])
    box = central_box(*image.size, crop_fraction)
    pixels = np.asarray(image.resize((size_px, size_px), RESAMPLING[interpolation], box))
    return pixels.reshape(size_px, size_px, channels)


def open_image(file: str | os.PathLike | bytes, mode: str) -> Image.Image:
    """An image file, or the bytes of one, by `to_mode`.

    Raises:
      UserError: it is missing, damaged, no image that Pillow reads, or refused by `to_mode`.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return to_mode(image, mode)
    except Exception as error:
        name = f"The image of {len(file)} bytes" if isinstance(file, bytes) else f"Image {os.fspath(file)!r}"
        raise UserError(f"{name} cannot be used ({_flaw(error)}): repair it or give another.") from error


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An opened image upright, as its EXIF data has it, and in Pillow's mode "L", "RGB" or "RGBA".

    Where alpha is dropped, white shows through. Of 16 bits the upper eight are kept, whatever range an image
    uses. Of an animation this is the first frame. Colour profiles are not applied.

    Raises:
      ValueError: the values are floating-point or beyond 16 bits, so that nothing says which of them is white.
      Exception: of any class, from Pillow, where data is damaged.
    """
    image.load()  # first: a TIFF turns itself upright here, a PNG may have its EXIF data at the end
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode[0] in "IF":  # also I;16 and I;16B; Pillow would clip them all at 255
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{values.dtype} {values.min()} to {values.max()}, not 8 or 16 bits a channel")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if mode != "RGBA" and image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def central_box(width: int, height: int, crop_fraction: float) -> Box:
    # Resized to s, this is the central square of the image with its short side resized to s / crop_fraction.
    side = min(width, height) * crop_fraction
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, min_crop_area: float, rng: np.random.Generator) -> Box | None:
    """Inception's crop: a share of the area, sides 3:4 to 4:3; None if ten draws do not fit in the image."""
    for _ in range(10):
        area = width * height * rng.uniform(min_crop_area, 1)
        aspect = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    return None


def find_flaw(file: str) -> str | None:
    """What makes an image file unusable, None if nothing is seen; it is read whole.

    Seen is what is empty, cut short, no image, too large for Pillow (179 megapixels) or refused by `to_mode`.
    What a format cannot tell from an image is not, such as changed bits in a JPEG.
    """
    try:
        with Image.open(file) as image:
            # A JPEG is read to its end all the same, but computed at an eighth of its size: in a third to half of
            # the time, or four fifths where it is progressive.
            image.draft("L", (1, 1))
            to_mode(image, "RGB")
    except Exception as error:
        return _flaw(error)
    return None


def _flaw(error: Exception) -> str:
    # Pillow's words are the address of a buffer.
    unknown = isinstance(error, UnidentifiedImageError)
    return "empty, cut short or no image that Pillow reads" if unknown else first_line(error)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
