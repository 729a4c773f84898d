"""Batches of images that a user gives: files, Pillow images and arrays, of any size and mode."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import advice, files_below, images_below, is_archive, local_path, suffix_of
from mlpmixer_flax.data.images import MODES, ImageLike, read_square
from mlpmixer_flax.dataloader import Batch
from mlpmixer_flax.faults import check_reachable, first_line
from mlpmixer_flax.inference.forward import rows_per_batch
from mlpmixer_flax.text import listed

# One image, several, or one array uint8 (n, h, w, c)
Images = ImageLike | Iterable[ImageLike]


def find_files(path: str | os.PathLike[str]) -> list[str]:
    """Returns the files that a path stands for, in a fixed order.

    A folder stands for the images in it and in its subfolders, a pattern ("*.jpg", "holiday/**/*.png") for
    the files that match it, and any other path for itself. A remote path stands for the files of its copy. Says on
    stderr if a folder has images in a format that cannot be read here.

    Raises:
      UserError: no such file exists, a folder cannot be read or has no images, or the path is a URL of a web page.
    """
    folder = path = local_path(path, name="image")
    while folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    # Brackets in the name of an existing folder are not a pattern.
    matches = sorted(glob.glob(glob.escape(folder) + path.removeprefix(folder), recursive=True))
    if not matches:
        check_reachable(path)
        raise UserError(f"{path!r} does not exist, and no file matches it as a pattern: give another path")
    files, others = [], Counter[str]()
    for match in matches:
        images = images_below(match) if os.path.isdir(match) else [match]
        files += images
        if os.path.isdir(match):
            others.update(map(suffix_of, {*files_below("", match.rstrip("/") or "/")}.difference(images)))
    left_out = listed([f"{suffix!r} files ({count:,})" for suffix, count in sorted(others.items())])
    remedy = advice(others)
    if files and remedy:
        print(f"left out of {path!r}: {left_out}; {remedy}", file=sys.stderr)
    if not files:
        remedy = remedy or ("unpack its archives" if any(map(is_archive, others)) else "give another path")
        raise UserError(f"{path!r} has no images{left_out and f', only {left_out}'}: {remedy}")
    return files


def find_all_files(paths: Iterable[str]) -> tuple[list[str], bool]:
    """Returns the files that paths stand for, each once, and whether every path stands for some.

    Says on stderr why a path stands for none.
    """
    files, all_found = dict[str, None](), True  # a dict, because a file may be named twice
    for path in paths:
        try:
            files |= dict.fromkeys(find_files(path))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            all_found = False
    return list(files), all_found


class ImageBatches:
    """Batches of square images as a model gets them at test time; iterate over it once.

    All batches have the same shape, so one compilation serves them. Threads read the next batch while the
    caller works on this one. An image that cannot be used is black in its batch, and `flaws` says why when
    the batch is yielded.

    Raises:
      UserError: `images` is neither an image nor several.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        channels: int,
        size_px: int,
        crop_fraction: float,
        interpolation: str,
        fit: str,
    ):
        self.images = _as_list(images)
        self.names = [_name(image, number) for number, image in enumerate(self.images)]
        self.flaws: dict[int, str] = {}  # number of an image that cannot be used -> a sentence, in order
        self._rows = rows_per_batch(min(batch_size, len(self.images)) or 1)
        self._shape = (size_px, size_px, channels)
        self._read_square = partial(
            read_square,
            channels=channels,
            size_px=size_px,
            crop_fraction=crop_fraction,
            interpolation=interpolation,
            fit=fit,
        )

    def __iter__(self) -> Iterator[Batch]:
        images, rows = self.images, self._rows
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            upcoming = pool.map(self._read, images[:rows])
            for start in range(0, len(images), rows):
                found = list(upcoming)
                upcoming = pool.map(self._read, images[start + rows : start + 2 * rows])
                batch = np.zeros((rows, *self._shape), np.uint8)
                for row, square in enumerate(found):
                    if isinstance(square, UserError):
                        self._add_flaw(start + row, str(square))
                    else:
                        batch[row] = square
                yield {"image": batch, "mask": np.arange(rows) < len(found)}

    def _read(self, image: ImageLike) -> np.ndarray | UserError:
        try:
            return self._read_square(_as_known(image))
        except UserError as error:
            return error

    def _add_flaw(self, number: int, flaw: str) -> None:
        is_file = isinstance(self.images[number], (str, os.PathLike))
        self.flaws[number] = flaw if is_file else f"{self.names[number]}: {flaw}"


def _name(image: ImageLike, number: int) -> str:
    return str(os.fspath(image)) if isinstance(image, (str, os.PathLike)) else f"images[{number}]"


def _as_list(images: Any) -> list[ImageLike]:
    """Returns images as a list, with one element if `images` is one image."""
    if isinstance(images, (str, os.PathLike, bytes, Image.Image)) or hasattr(images, "read"):
        return [images]
    # Arrays of NumPy, JAX and other libraries; those of names, and pandas' columns, are lists.
    shape, kind = getattr(images, "shape", None), getattr(getattr(images, "dtype", None), "kind", "")
    if shape is not None and len(shape) != 4 and kind not in ("O", "U", "S", "T"):
        return [images]
    try:
        return list(images)
    except TypeError:
        raise UserError(f"images={images!r:.50} are not images: give a list of images") from None


def _as_known(image: ImageLike) -> ImageLike:
    """Returns an image that `read_square` takes, with arrays of other libraries as NumPy arrays.

    Raises:
      UserError: it is a folder or a URL, or an array that is not uint8 (h, w) or (h, w, c).
    """
    if isinstance(image, (str, os.PathLike)):
        path = local_path(image, name="image")
        if os.path.isdir(path):
            raise UserError(f"image {path!r} is a folder: give the images in it")
        return path
    if not hasattr(image, "__array__"):
        return image
    try:
        array = np.asarray(image)
    except Exception as error:
        raise UserError(
            f"it cannot become a NumPy array ({first_line(error)}): give uint8 (h, w, c)"
        ) from error
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in MODES):
        first = array.ndim == 3 and array.shape[0] in MODES
        hint = "; if its channels come first, give array.transpose(1, 2, 0)" if first else ""
        raise UserError(
            f"it has shape {array.shape}: give (h, w), or (h, w, c) with 1, 3 or 4 channels, or several images as "
            f"(n, h, w, c){hint}"
        )
    if array.dtype != np.uint8:
        example = _as_levels(array)
        raise UserError(
            f"it has type {array.dtype}: give levels from 0 to 255 as uint8{example and f', for example {example}'}"
        )
    return array


def _as_levels(array: np.ndarray) -> str:
    """Returns code that makes uint8 levels of an array; "" if its values do not say which is white."""
    if array.dtype == bool:
        return "255 * array.astype('uint8')"
    if array.dtype.kind not in "iuf" or not array.size or not 0 <= array.min() <= array.max() <= 255:
        return ""
    if array.dtype.kind == "f":
        return (
            "(255 * array).round().astype('uint8')" if array.max() <= 1 else "array.round().astype('uint8')"
        )
    return "array.astype('uint8')"
