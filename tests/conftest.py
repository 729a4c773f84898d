"""What several files of tests start from."""

import os

import numpy as np
import pytest
from made_datasets import encode, write_dataset

# Tests run in two processes and start others: on a GPU none may take most of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 training and 9 test JPEGs of several sizes, two of them grayscale: a gradient across, one down."""
    rng = np.random.default_rng(0)

    def photo(i):
        width, height = int(rng.integers(20, 60)), int(rng.integers(20, 60))
        across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
        down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        pixels = np.stack([across, down, np.full((height, width), 6 * i)], -1).astype(np.uint8)
        return encode(pixels[..., 0] if i in (3, 4) else pixels, "JPEG", quality=95), i % 3

    examples = {"train": [photo(i) for i in range(40)], "test": [photo(i) for i in range(9)]}
    return write_dataset(tmp_path_factory.mktemp("photos"), "photos", examples)
