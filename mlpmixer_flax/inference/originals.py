"""Reads images of a dataset as they are stored, for people to look at."""

from collections.abc import Sequence

import numpy as np

from mlpmixer_flax.data.decoding import decode
from mlpmixer_flax.data.images import MODES
from mlpmixer_flax.dataloader import Examples


def read_originals(examples: Examples, indices: Sequence[int], *, side_px: int = 400) -> list[np.ndarray]:
    """Returns images upright, in color and in their own aspect ratio: uint8 (h, w, 3), or (h, w, 4) for RGBA models.

    An image with a side above `side_px` is made smaller.
    """
    mode = MODES[max(examples.image_shape[2], 3)]
    images = []
    for index in indices:  # one after another, because photos are large
        (record,) = examples.source.records.__getitems__([index])
        image, _ = decode(record.image, mode)
        image.thumbnail((side_px, side_px))
        images.append(np.asarray(image))
    return images
