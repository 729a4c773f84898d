"""Batches of images that a user gives: files, Pillow images and arrays, of any size and mode."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.data.images import ImageLike, read_square
from mlpmixer_flax.dataloader import Batch
from mlpmixer_flax.inference.forward import rows_per_batch


class ImageBatches:
    """Batches of square images as a model gets them at test time; iterate over it once.

    All batches have the same shape, so one compilation serves them. Threads read the next batch while the
    caller works on this one. An image that cannot be used is black in its batch, and `flaws` says why when
    the batch is yielded.

    Raises:
      UserError: `images` is a single image.
    """

    def __init__(
        self,
        images: Sequence[ImageLike] | np.ndarray,
        *,
        batch_size: int,
        channels: int,
        size_px: int,
        crop_fraction: float,
        interpolation: str,
        fit: str,
    ):
        single = isinstance(images, (str, bytes, os.PathLike, Image.Image))
        if single or (isinstance(images, np.ndarray) and images.ndim != 4):
            raise UserError(
                "images must be a list of images or an array (n, h, w, c): write [image] for one image"
            )
        self.images = list(images)
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
            return self._read_square(image)
        except UserError as error:
            return error

    def _add_flaw(self, number: int, flaw: str) -> None:
        is_file = isinstance(self.images[number], (str, os.PathLike))
        self.flaws[number] = flaw if is_file else f"{self.names[number]}: {flaw}"


def _name(image: ImageLike, number: int) -> str:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"images[{number}]"
