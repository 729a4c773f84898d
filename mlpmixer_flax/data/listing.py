"""Lists of labelled image files, as a folder or a table has them: their splits, and their images by index."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

from mlpmixer_flax import UserError
from mlpmixer_flax.data.layout import split_of
from mlpmixer_flax.data.splits import (
    DatasetInfo,
    Label,
    Part,
    Record,
    SplitLike,
    num_examples,
    read_split,
)
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.text import quoted

COLOR_SHAPE = (None, None, 3)  # of all images in files: any size, read in colour


class LabelledFile(NamedTuple):
    """An image file and its classes."""

    file: str  # relative to the root, with "/" on every system
    classes: tuple[str, ...]  # one; or any number, if the images have several labels


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder or a table says: which image files exist, with which labels, in which splits."""

    kind: str  # "folder" or "table", for messages
    path: str  # as the user gave it
    root: str  # the folder that file names are relative to; absolute
    form: str  # what it should look like, for messages
    splits: dict[str, list[LabelledFile]]  # split -> its images, in the order of which slices are made
    other_names: dict[str, str]  # other name of a split, in lower case -> split
    notes: list[str]  # facts that the user should know
    multi_label: bool  # whether an image may have several labels, or none

    @functools.cached_property
    def class_names(self) -> list[str]:
        """The class names of the training images, or of all images if there is no training split; sorted."""
        splits = [self.splits["train"]] if "train" in self.splits else self.splits.values()
        return sorted({name for images in splits for image in images for name in image.classes})


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """The images of a split by index, as stored on disk."""

    root: str
    files: list[str]
    labels: list[Label]
    sizes: list[int] | None = None  # in bytes, when the images were checked; None = they were not

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> list[Record]:
        """Returns records, whose names are those of the files.

        Raises:
          UserError: a file no longer exists, may no longer be read, or has another size than when it was checked.
          OSError: the disk or a limit of the system is at fault.
        """
        return [Record(self.files[i], self._read(i), self.labels[i]) for i in indices]

    def _read(self, i: int) -> bytes:
        path = os.path.join(self.root, self.files[i])
        try:
            with open_file(path) as file:
                content = file.read()
        except OSError as error:
            pass_on(error, path)
            check_folder(self.root)
            gone = isinstance(error, FileNotFoundError)
            event = "was deleted, moved or renamed" if gone else f"cannot be read now ({error.strerror})"
            raise UserError(f"image {path!r} {event}: restore it, and start again") from error
        if self.sizes is not None and len(content) != self.sizes[i]:
            raise UserError(
                f"image {path!r} has {len(content):,} bytes, but had {self.sizes[i]:,} when it was checked, so somebody "
                "has changed or replaced it: restore it, and start again"
            )
        return content


def check_folder(root: str) -> None:
    """Raises UserError if a folder of images has disappeared; a drive that is unmounted leaves an empty folder."""
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        if any(entries):
            return
    raise UserError(
        f"folder {root!r} is empty or does not exist any more: restore it or mount its drive again, and start again"
    )


def info_of(listing: Listing, split: SplitLike) -> DatasetInfo:
    """Returns the facts about a split.

    Raises:
      UserError: as `select_split`.
    """
    names = listing.class_names
    return {
        "num_examples": len(select_split(listing, split)),
        "num_classes": len(names),
        "class_names": names,
        "int2str": names.__getitem__,
        "image_shape": COLOR_SHAPE,
        "multi_label": listing.multi_label,
    }


class _Count(NamedTuple):
    num_examples: int

    @property
    def shard_lengths(self) -> list[int]:
        raise ValueError("folders and tables have no shards")


class _Counts(dict[str, _Count]):
    """Split -> number of images, found by every name of a split; iterates over each split once."""

    def __init__(self, listing: Listing):
        super().__init__({split: _Count(len(images)) for split, images in listing.splits.items()})
        self._names = listing.other_names

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _find(self.keys(), self._names, name) is not None

    def __missing__(self, name: str) -> _Count:
        split = _find(self.keys(), self._names, name)
        if split is None:
            raise KeyError(name)
        return self[split]


def split_parts(listing: Listing, split: SplitLike) -> list[Part]:
    """Returns the parts of the listing's own splits that a split consists of.

    Args:
      listing: a folder or a table.
      split: in TFDS's syntax ("train[:90%]", "train[100:]+validation", "all"; see `splits`), without shards. The
        names are "train", "validation" (also "valid", "val" or "dev") and "test", which is the validation split
        if there is no test split, or those of the folders.

    Raises:
      UserError: the split is unknown or empty.
    """
    try:
        parts = read_split(split, _Counts(listing))
    except ValueError as error:
        raise UserError(
            f"split {split!r} of {listing.kind} {listing.path!r} cannot be read ({error}): use "
            f"{quoted({*listing.splits, 'test'})}, or a slice such as 'train[:90%]'"
        ) from error
    if not num_examples(parts):
        raise UserError(
            f"split {split!r} of {listing.kind} {listing.path!r} has no images: use another slice, or add images"
        )
    return [
        part._replace(split=_find(listing.splits, listing.other_names, part.split) or part.split)
        for part in parts
    ]


def select_split(listing: Listing, split: SplitLike) -> FileRecords:
    """Returns the images of a split, in the order of the listing.

    Args:
      listing: a folder or a table.
      split: as in `split_parts`.

    Raises:
      UserError: as `split_parts`; or the split has a class that the training images do not have.
    """
    labels = {name: label for label, name in enumerate(listing.class_names)}
    chosen: list[LabelledFile] = []
    for name, start, stop in split_parts(listing, split):
        images = listing.splits[name]
        unknown = {each for image in images for each in image.classes} - labels.keys()
        if unknown:
            raise UserError(
                f"split {name!r} of {listing.kind} {listing.path!r} has classes that the training images do not have: "
                f"{quoted(unknown)}; rename or remove them"
            )
        chosen += images[start:stop]
    numbers = [tuple(labels[name] for name in one.classes) for one in chosen]
    return FileRecords(
        listing.root,
        files=[one.file for one in chosen],
        labels=list(numbers) if listing.multi_label else [number for (number,) in numbers],
    )


def _find(splits: Collection[str], names: Mapping[str, str], name: str) -> str | None:
    """Returns the split with this name, by its own name, a usual one, or another one in the listing; or None."""
    split = name if name in splits else names.get(name.casefold()) or split_of(name)
    if split == "test" and split not in splits:
        split = "validation"
    return split if split in splits else None
