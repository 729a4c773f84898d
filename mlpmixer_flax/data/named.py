"""Finds what the name of a dataset stands for, a folder or a table of images or a TFDS dataset, and facts about it."""

import os

from mlpmixer_flax.data.files import absolute
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.listing import Listing, info_of, split_parts
from mlpmixer_flax.data.splits import DatasetInfo, Part, SplitLike, count_common
from mlpmixer_flax.data.tables import read_table
from mlpmixer_flax.data.tfds import tfds_info, tfds_parts

_READERS = {
    "folder": read_folder,
    "table": read_table,
}  # what is before the colon -> what reads the path after it


def listing_of(dataset: str) -> Listing | None:
    """Returns the folder or table of images that a dataset is; None if it is a TFDS dataset.

    Raises:
      UserError: as `read_folder` and `read_table`.
    """
    kind, colon, path = dataset.partition(":")
    return _READERS[kind](path) if colon and kind in _READERS else None


def is_files(dataset: str) -> bool:
    """Returns whether a dataset is a folder or a table of image files."""
    kind, colon, _ = dataset.partition(":")
    return bool(colon) and kind in _READERS


def with_absolute_path(dataset: str) -> str:
    """Returns the name of a dataset with the absolute path of its folder or table, valid from any directory."""
    kind, _, path = dataset.partition(":")
    return f"{kind}:{absolute(path)}" if is_files(dataset) else dataset


def get_dataset_info(
    dataset: str, split: SplitLike = "train", *, data_dir: str | os.PathLike[str] = ""
) -> DatasetInfo:
    """Returns facts about a split, without decoding an image.

    Args:
      dataset: "digits" (embedded), a TFDS name: "cifar10", "cifar10:3.0.2", "name/config"; "folder:PATH", a
        folder of images in the layout that `folders` describes; or "table:FILE", a table that `tables` describes.
      split: in TFDS's syntax, for folders and tables too: "train", "train[:90%]", "train[100:]+test", "all"; or an
        object of tfds.even_splits. Slices of shards are for TFDS datasets only.
      data_dir: TFDS directory; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      A dict: `num_examples`, `num_classes`, `class_names` (list of str), `int2str` (label -> name),
      `image_shape` (h, w, c), where h and w are None if the images vary in size, and `multi_label`: whether an
      image may have several labels.

    Raises:
      UserError: the dataset is unknown, not prepared or without images and labels; or the split is
        unknown or empty.
    """
    listing = listing_of(dataset)
    return info_of(listing, split) if listing else tfds_info(dataset, split, data_dir=data_dir)


def parts_of(dataset: str, *splits: SplitLike, data_dir: str | os.PathLike[str] = "") -> list[list[Part]]:
    """Returns the parts of the dataset's own splits that each of some splits consists of.

    Raises:
      UserError: as `get_dataset_info`.
    """
    listing = listing_of(dataset)
    if listing is None:
        return tfds_parts(dataset, *splits, data_dir=data_dir)
    return [split_parts(listing, split) for split in splits]


def count_overlap(
    dataset: str, split: SplitLike, other: SplitLike, *, data_dir: str | os.PathLike[str] = ""
) -> int:
    """Returns how many examples belong to both of two splits, without reading an example.

    Examples are the same if they have the same place in a TFDS dataset, or the same file name in a folder or table.
    Copies with another place or name are not counted.

    Args:
      dataset, data_dir: as in `get_dataset_info`.
      split, other: as `split` in `get_dataset_info`: "train[:80%]" and "train[70%:]".

    Raises:
      UserError: as `get_dataset_info`.
    """
    return count_common(*parts_of(dataset, split, other, data_dir=data_dir))
