"""Real folders of small images for tests."""

from pathlib import Path

import numpy as np
from made_datasets import encode


def write(root, *files, data=None):
    """Writes one small image per name, or `data` to each file; returns the root as text."""
    for file in files:
        path = Path(root, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.full((6, 6), len(file), np.uint8), "PNG") if data is None else data)
    return str(root)


def names(folder, count, start=0):
    """Returns "folder/0.png" and so on."""
    return [f"{folder}/{i}.png" for i in range(start, start + count)]
