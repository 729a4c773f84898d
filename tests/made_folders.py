"""Real folders of small images for tests, and what the package finds in them."""

from pathlib import Path

import numpy as np
from made_datasets import encode

from mlpmixer_flax.data.dataset import find_dataset
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.image_checks import open_files
from mlpmixer_flax.data.listing import FileRecords, select_split


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


def files_of(path, split):
    """Returns the images of a split, relative to the folder."""
    return select_split(read_folder(str(path)), split).files


def open_split(path, split, *, skip_bad_images=False):
    """Returns the records of a split after the check of its images."""
    (source,) = open_files(
        read_folder(str(path)), [split], skip_bad_images=skip_bad_images, for_training=False
    )
    assert isinstance(source.records, FileRecords)
    return source.records


def open_to_train(dataset, train_split, test_split, *, skip_bad_images=False):
    """Opens the splits of a run after the check of all images; a dataset is "folder:PATH" or "table:FILE"."""
    return find_dataset(dataset).open(
        [train_split, test_split], skip_bad_images=skip_bad_images, for_training=True
    )
