"""Folders of images as datasets: PATH/<class>/*, or PATH/train/<class>/* with test or val beside it.

`layout` says which subfolders are splits and classes. Only `FolderRecords` and the search for images with unknown
suffixes open files.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import is_archive, local_path
from mlpmixer_flax.data.layout import LAYOUT, Classes, find_layout, split_of
from mlpmixer_flax.data.splits import DatasetInfo, Part, Record, SplitLike, num_examples, read_split
from mlpmixer_flax.faults import check_reachable, pass_on
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.text import quoted

COLOR_SHAPE = (None, None, 3)  # of all images in folders: any size, read in colour
_HASH_BYTES = 8
_FIFTH = 256**_HASH_BYTES // 5  # images with hashes below this are for validation


@dataclasses.dataclass(frozen=True)
class Folder:
    """The contents of a folder of images; file names are relative to `root`, with "/" on every system."""

    path: str  # as the user gave it
    root: str  # absolute
    splits: dict[str, Classes]  # split -> class -> files in an order that looks random
    names: dict[str, str]  # name of a split's folder, in lower case -> split
    notes: list[str]  # facts that the user should know

    @property
    def class_names(self) -> list[str]:
        """The class names of the training images, or of all images if there is no training split; sorted."""
        splits = [self.splits["train"]] if "train" in self.splits else self.splits.values()
        return sorted({name for classes in splits for name in classes})


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """The images of a split by index, as stored on disk."""

    root: str
    files: list[str]
    labels: list[int]
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


def read_folder(path: str | os.PathLike[str]) -> Folder:
    """Finds the classes and splits of a folder; takes about a second for 50,000 files.

    If there are training images and no validation images, about a fifth of each class becomes split
    "validation": the images whose names below the split have a hash in the lowest fifth. So it is the same
    images on every machine, and an image stays in its split when others are added or removed. At least one
    image of each class stays in split "train".

    Raises:
      UserError: the folder does not exist, cannot be read, has the wrong layout or has no images.
    """
    path = os.fspath(path)
    root = os.path.abspath(local_path(path, name="folder"))
    if os.path.isfile(root):
        kind = "an archive: unpack it" if is_archive(root) else "a file: put the images in class folders"
        raise UserError(f"{path!r} is {kind} and give the folder, with the layout {LAYOUT}")
    if not path or not os.path.isdir(root):
        check_reachable(root)
        raise UserError(f"folder {path!r} does not exist: give folder:PATH with the layout {LAYOUT}")
    try:
        layout = find_layout(path, root)
    except OSError as error:
        pass_on(error)
        raise UserError(
            f"folder {path!r} cannot be read ({error}): restore it, or mount its drive again"
        ) from error
    splits, notes = {}, list(layout.notes)
    for split, classes in layout.splits.items():
        prefix = layout.folders[split]
        splits[split] = {
            name: sorted(files, key=lambda file, prefix=prefix: _hash(file, prefix))
            for name, files in sorted(classes.items())
        }
    if splits.get("train") == {} or not any(splits.values()):
        raise UserError(
            f"folder {path!r} has no images in class folders: the expected layout is "
            f"{'; '.join([LAYOUT, *notes])}"
        )
    if "train" in splits and "validation" not in splits:
        splits["train"], splits["validation"], note = _cut(path, splits["train"], layout.folders["train"])
        notes.append(note)
        splits = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    if "test" not in splits:
        notes.append(f"{path!r} has no test images: split 'test' is {_find(splits, {}, 'test')!r}")
    names = {name.casefold(): split for name, split in layout.names.items()}
    return Folder(path, root, splits, names, notes)


def _cut(path: str, classes: Classes, prefix: str) -> tuple[Classes, Classes, str]:
    """Returns the training images, the validation images and a note about them."""
    cuts = {}
    for name, files in classes.items():
        below = bisect.bisect_left(files, _FIFTH, key=lambda file: int.from_bytes(_hash(file, prefix)))
        cuts[name] = min(below, len(files) - 1)
    several = [name for name, files in classes.items() if len(files) > 1]
    no_hash_is_low = not any(cuts.values()) and several
    if no_hash_is_low:
        cuts[min(several, key=lambda name: _hash(classes[name][0], prefix))] = 1
    train = {name: files[cuts[name] :] for name, files in classes.items()}
    validation = {name: files[: cuts[name]] for name, files in classes.items()}
    note = (
        f"{path!r} has no validation images: about a fifth of each class, {sum(cuts.values()):,} images chosen by "
        "a hash of their names, becomes split 'validation'; at least one image of each class stays in 'train'"
    )
    without = [name for name, cut in cuts.items() if not cut]
    if without:
        note += f"; classes without a validation image ({len(without):,}): {quoted(without, 5)}"
    if no_hash_is_low:
        note += "; the choice may change when images are added, because no hash is in the lowest fifth"
    return train, validation, note


def folder_info(path: str | os.PathLike[str], split: SplitLike) -> DatasetInfo:
    """Returns the facts about a split.

    Raises:
      UserError: as `read_folder` and `select_split`.
    """
    folder = read_folder(path)
    return {
        "num_examples": len(select_split(folder, split)),
        "num_classes": len(folder.class_names),
        "class_names": folder.class_names,
        "int2str": folder.class_names.__getitem__,
        "image_shape": COLOR_SHAPE,
    }


def folder_parts(path: str | os.PathLike[str], *splits: SplitLike) -> list[list[Part]]:
    """Returns the parts of each of some splits; see `split_parts`.

    Raises:
      UserError: as `read_folder` and `split_parts`.
    """
    folder = read_folder(path)
    return [split_parts(folder, split) for split in splits]


class _Count(NamedTuple):
    num_examples: int

    @property
    def shard_lengths(self) -> list[int]:
        raise ValueError("a folder has no shards")


class _Counts(dict[str, _Count]):
    """Split -> number of images, found by every name of a split; iterates over each split once."""

    def __init__(self, folder: Folder):
        counts = {split: sum(map(len, classes.values())) for split, classes in folder.splits.items()}
        super().__init__({split: _Count(count) for split, count in counts.items()})
        self._names = folder.names

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _find(self.keys(), self._names, name) is not None

    def __missing__(self, name: str) -> _Count:
        return self[_find(self.keys(), self._names, name) or ""]


def split_parts(folder: Folder, split: SplitLike) -> list[Part]:
    """Returns the parts of the folder's splits that a split consists of.

    Args:
      folder: from `read_folder`.
      split: in TFDS's syntax ("train[:90%]", "train[100:]+validation", "all"; see `splits`), without shards. The
        names are "train", "validation" (also "valid", "val" or "dev") and "test", which is the validation split
        if there is no test split, or those of the folders.

    Raises:
      UserError: the split is unknown or empty.
    """
    try:
        parts = read_split(split, _Counts(folder))
    except ValueError as error:
        raise UserError(
            f"split {split!r} of folder {folder.path!r} cannot be read ({error}): use "
            f"{quoted({*folder.splits, 'test'})}, or a slice such as 'train[:90%]'"
        ) from error
    if not num_examples(parts):
        raise UserError(
            f"split {split!r} of folder {folder.path!r} has no images: use another slice, or add images"
        )
    return [
        part._replace(split=_find(folder.splits, folder.names, part.split) or part.split) for part in parts
    ]


def select_split(folder: Folder, split: SplitLike) -> FolderRecords:
    """Returns the images of a split, in an order that gives any slice its share of each class.

    Args:
      folder: from `read_folder`.
      split: as in `split_parts`.

    Raises:
      UserError: as `split_parts`; or the split has a class that the training images do not have.
    """
    labels = {name: label for label, name in enumerate(folder.class_names)}
    chosen = []
    for name, start, stop in split_parts(folder, split):
        unknown = folder.splits[name].keys() - labels.keys()
        if unknown:
            raise UserError(
                f"split {name!r} of folder {folder.path!r} has classes that the training images do not have: "
                f"{quoted(unknown)}; rename or remove them"
            )
        # Spreads every class evenly over the order.
        ordered = sorted(
            ((rank + 0.5) / len(files), labels[name], file)
            for name, files in folder.splits[name].items()
            for rank, file in enumerate(files)
        )
        chosen += ordered[start:stop]
    return FolderRecords(folder.root, [file for _, _, file in chosen], [label for _, label, _ in chosen])


def files_of(folder: Folder, split: str) -> list[str]:
    """Returns all images of one of the folder's own splits."""
    return [file for files in folder.splits[split].values() for file in files]


def _find(splits: Mapping[str, Any] | Any, names: Mapping[str, str], name: str) -> str | None:
    """Returns the split with this name, by its own name, a usual one, or the name of its folder; or None."""
    split = name if name in splits else names.get(name.casefold()) or split_of(name)
    if split == "test" and split not in splits:
        split = "validation"
    return split if split in splits else None


def _hash(file: str, prefix: str) -> bytes:
    below = unicodedata.normalize("NFC", file.removeprefix(prefix))
    return hashlib.blake2b(os.fsencode(below), digest_size=_HASH_BYTES).digest()
