"""Finds what the name of a dataset stands for, a folder or a table of images or a TFDS dataset, and facts about it."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset that was looked up: the files of a folder or table are listed, which takes long if there are many."""

    name: str  # as in `get_dataset_info`
    data_dir: str
    listing: Listing | None  # None = a TFDS dataset

    def info(self, split: SplitLike) -> DatasetInfo:
        """Returns facts about a split, as `get_dataset_info`."""
        return (
            info_of(self.listing, split)
            if self.listing
            else tfds_info(self.name, split, data_dir=self.data_dir)
        )

    def parts(self, *splits: SplitLike) -> list[list[Part]]:
        """Returns the parts of the dataset's own splits that each of some splits consists of.

        Raises:
          UserError: as `get_dataset_info`.
        """
        if self.listing is None:
            return tfds_parts(self.name, *splits, data_dir=self.data_dir)
        return [split_parts(self.listing, split) for split in splits]

    def count_overlap(self, split: SplitLike, other: SplitLike) -> int:
        """Returns how many examples belong to both of two splits, without reading an example.

        Examples are the same if they have the same place in a TFDS dataset, or the same file name in a folder or
        table. Copies with another place or name are not counted.

        Args:
          split, other: as `split` in `get_dataset_info`: "train[:80%]" and "train[70%:]".

        Raises:
          UserError: as `get_dataset_info`.
        """
        return count_common(*self.parts(split, other))


def look_up(dataset: str, *, data_dir: str | os.PathLike[str] = "") -> Dataset:
    """Returns a dataset by its name; `get_dataset_info` has the arguments.

    Raises:
      UserError: as `read_folder` and `read_table`.
    """
    kind, _, path = dataset.partition(":")
    return Dataset(dataset, os.fspath(data_dir), _READERS[kind](path) if is_files(dataset) else None)


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
    return look_up(dataset, data_dir=data_dir).info(split)
