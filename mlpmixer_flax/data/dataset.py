"""Finds what the name of a dataset stands for, a folder or a table of images or a TFDS dataset, and facts about it."""

import dataclasses
import os
from collections.abc import Sequence

from mlpmixer_flax.data.files import absolute
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.image_checks import open_files
from mlpmixer_flax.data.listing import Listing, info_of, split_parts
from mlpmixer_flax.data.splits import DatasetInfo, Part, Source, SplitLike, count_common
from mlpmixer_flax.data.tables import read_table
from mlpmixer_flax.data.tfds import Builder, load_builder, open_tfds, tfds_info, tfds_parts

# What is before the colon -> what reads the path after it
_READERS = {"folder": read_folder, "table": read_table}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset that was found by its name; the files of a folder or table are listed, which may take long."""

    name: str  # as in `get_dataset_info`
    listing: Listing | None  # of a folder or table
    builder: Builder | None  # of a TFDS dataset

    def info(self, split: SplitLike) -> DatasetInfo:
        """Returns facts about a split; the result and errors are those of `get_dataset_info`."""
        return info_of(self.listing, split) if self.listing else tfds_info(self.builder, split)

    def parts(self, split: SplitLike) -> list[Part]:
        """Returns the parts of the dataset's own splits that a split consists of; errors are those of `info`."""
        return split_parts(self.listing, split) if self.listing else tfds_parts(self.builder, split)

    def count_overlap(self, split: SplitLike, other: SplitLike) -> int:
        """Returns how many examples belong to both of two splits, without reading an example.

        Examples are the same if they have the same place in a TFDS dataset, or the same file name in a folder or
        table. Copies with another place or name are not counted. Errors are those of `info`.
        """
        return count_common(self.parts(split), self.parts(other))

    def open(
        self, splits: Sequence[SplitLike], *, skip_bad_images: bool, for_training: bool = False
    ) -> list[Source]:
        """Opens splits for reading by index, after a check of the images if they are files.

        Args:
          splits: as `split` in `get_dataset_info`.
          skip_bad_images: leaves out the files that cannot be used. The images of a TFDS dataset are not checked here.
          for_training: the splits are those to train and to evaluate on. Then the images of all splits of a folder or
            table are checked, so that one error counts all bad images, and copies in two splits are found.

        Raises:
          UserError: as `info`; the dataset is prepared in a format without random access; a folder or table has bad
            images (the message lists the first of them); or one to train on has only one class.
        """
        if self.listing:
            return open_files(
                self.listing, splits, skip_bad_images=skip_bad_images, for_training=for_training
            )
        return [open_tfds(self.builder, self.name, split) for split in splits]


def find_dataset(dataset: str, *, data_dir: str | os.PathLike[str] = "") -> Dataset:
    """Returns a dataset by its name; the arguments are those of `get_dataset_info`.

    Raises:
      UserError: the dataset is unknown, not prepared, or without images.
    """
    kind, _, path = dataset.partition(":")
    if is_files(dataset):
        return Dataset(dataset, _READERS[kind](path), None)
    return Dataset(dataset, None, load_builder(dataset, data_dir))


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
    return find_dataset(dataset, data_dir=data_dir).info(split)
