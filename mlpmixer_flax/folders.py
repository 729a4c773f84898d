"""Folders of images as datasets: PATH/<class>/*, or PATH/train/<class>/* with test or val beside it.

No file is opened here but when a FolderSource is read: images are known by their suffix, classes and splits by
the names of folders.
"""

import dataclasses
import functools
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from typing import Any

from PIL import Image

from mlpmixer_flax import UserError

LAYOUT = "PATH/<class>/*.jpg, or PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg"
_VALIDATION = ("validation", "valid", "val")
# A split as it is asked for -> the folders that may be it; the first there is counts.
_SPLITS = {"train": ("train",), "test": ("test", *_VALIDATION)} | dict.fromkeys(_VALIDATION, _VALIDATION)
_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_LEFT_BEHIND = {"__MACOSX", "@eaDir"}  # by macOS and Synology, with copies of images in them
# Pillow names files of these formats, and decodes none or only with another program.
_NOT_PIXELS = set("BUFR EPS GRIB HDF5 MPEG WMF".split())


@dataclasses.dataclass(frozen=True)
class Folder:
    """What lies in a folder of images. Files are relative to `root`, with "/" on every system."""

    path: str  # as the user gave it
    root: str  # absolute
    splits: dict[str, dict[str, list[str]]]  # split -> class -> files in an order that looks random
    notes: list[str]  # what a user should know of it

    @property
    def class_names(self) -> list[str]:
        """Those of the training images, or of all where there are none, sorted."""
        splits = [self.splits["train"]] if "train" in self.splits else self.splits.values()
        return sorted({name for classes in splits for name in classes})


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The images of a split by index, as they lie on disk."""

    root: str
    files: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Records {"image": bytes, "label": int, "file_name": str}; OSError where a file is gone."""
        records = []
        for i in indices:
            with open(os.path.join(self.root, self.files[i]), "rb") as file:
                records.append({"image": file.read(), "label": self.labels[i], "file_name": self.files[i]})
        return records


def read_folder(path: str) -> Folder:
    """Finds classes and splits: 50,000 files in about a second.

    Where there are training images and none for validation, a fifth of each class becomes split "validation":
    those with the least hashes of their names below `path`, so the same on every machine.

    Raises:
      UserError: the folder is missing, cannot be read, isn't laid out as it must be, or holds no images.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise UserError(f"Folder {path!r} does not exist: give folder:PATH, with {LAYOUT}.")
    left_out = Counter()
    try:
        prefixes = _find_splits(path, root, left_out)
        splits = {split: _read_classes(root, prefix, left_out) for split, prefix in prefixes.items()}
    except OSError as error:
        raise UserError(f"Folder {path!r} cannot be read ({error}): change its permissions.") from error
    counted = ", ".join(f"{what} ({count})" for what, count in left_out.items())
    notes = [f"left out of {path!r}: {counted}"] if left_out else []
    train = splits.get("train")
    if train == {} or not any(splits.values()):
        raise UserError(
            f"Folder {path!r} has no images of a class: expected is {'; '.join([LAYOUT, *notes])}."
        )
    if train and not _find(splits, "validation"):
        cut = {name: max(1, round(len(files) / 5)) if len(files) > 1 else 0 for name, files in train.items()}
        splits["train"] = {name: files[cut[name] :] for name, files in train.items()}
        splits["validation"] = {name: files[: cut[name]] for name, files in train.items()}
        notes.append(
            f"{path!r} has no validation images: a fifth of each class, {sum(cut.values())} images chosen by "
            "their names, becomes split 'validation'"
        )
    if "test" not in splits:
        notes.append(f"{path!r} has no test images: split 'test' is {_find(splits, 'test')!r}")
    return Folder(path, root, splits, notes)


def select_split(folder: Folder, split: str) -> FolderSource:
    """The images of a split, in an order in which any slice has its share of each class.

    `split` is "train", "validation" ("valid" and "val" are the same) or "test", which is the validation split
    where there is no other; slices and sums are as in TFDS: "train[:90%]", "train[100:]+validation".

    Raises:
      UserError: the split is unknown or empty, or has a class that training has not.
    """
    labels = {name: label for label, name in enumerate(folder.class_names)}
    chosen = []
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part.strip())
        name = _find(folder.splits, match[1]) if match else None
        if name is None:
            known = ", ".join(map(repr, sorted({*folder.splits, "test"})))
            raise UserError(
                f"Split {split!r} of folder {folder.path!r} is unknown: use {known}, or a slice: 'train[:90%]'."
            )
        unknown = folder.splits[name].keys() - labels.keys()
        if unknown:
            raise UserError(
                f"Split {name!r} of folder {folder.path!r} has classes that training has not: "
                f"{', '.join(map(repr, sorted(unknown)))}: rename or remove them."
            )
        # Every class spreads over the whole of the order.
        ordered = sorted(
            ((rank + 0.5) / len(files), labels[name], file)
            for name, files in folder.splits[name].items()
            for rank, file in enumerate(files)
        )
        chosen += ordered[slice(*(_in_examples(end, len(ordered)) for end in match.groups()[1:]))]
    if not chosen:
        raise UserError(
            f"Split {split!r} of folder {folder.path!r} has no images: use another slice, or add some."
        )
    return FolderSource(folder.root, [file for _, _, file in chosen], [label for _, label, _ in chosen])


def images_below(path: str) -> list[str]:
    """The images in a folder and in those in it, sorted; each begins with `path`.

    Raises UserError where the folder, or one in it, cannot be read.
    """
    try:
        return sorted(filter(_is_image, _files_below("", path.rstrip("/") or "/")))
    except OSError as error:
        raise UserError(f"Folder {path!r} cannot be read ({error}): change its permissions.") from error


def _in_examples(end: str | None, count: int) -> int | None:
    if end is None or not end.endswith("%"):
        return end and int(end)
    return round(int(end[:-1]) * count / 100)


def _find_splits(path: str, root: str, left_out: Counter) -> dict[str, str]:
    """Split -> the folder of its classes below root, "" or with a "/" at its end; counts what is beside."""
    folders, files = _list(root)
    if not folders:
        if any(map(_is_image, files)):
            raise UserError(
                f"{path!r} holds images and no class folders: did you mean its parent, "
                f"folder:{os.path.dirname(root)}? Expected is {LAYOUT}."
            )
        raise UserError(f"{path!r} holds no class folders: expected is {LAYOUT}.")
    named = [name for name in folders if name.casefold() in _SPLITS]
    splits = [name for name in named if _holds_classes(os.path.join(root, name))]
    if not splits and named != folders:
        return {"train": ""}
    found = {name.casefold(): f"{name}/" for name in splits}
    if not found or ("train" not in found and "train" in map(str.casefold, named)):
        raise UserError(
            f"{path!r} has {', '.join(map(repr, named))}, and 'train' is missing or isn't made of class folders: "
            f"expected is {LAYOUT}."
        )
    if len(found) < len(splits) or len(found.keys() & _VALIDATION) > 1:
        raise UserError(
            f"{path!r} has {', '.join(map(repr, splits))}, of which two are one split: rename one."
        )
    left_out.update(f"folder {name!r} beside the splits" for name in folders if name not in splits)
    return found


def _holds_classes(folder: str) -> bool:
    # Else it is a class of that name: there are trains to be told from buses.
    folders, files = _list(folder)
    return bool(folders) and not any(map(_is_image, files))


def _read_classes(root: str, prefix: str, left_out: Counter) -> dict[str, list[str]]:
    """Class -> its images below root, in the order of their hashes; counts what is no image of a class."""
    classes = {}
    folders, files = _list(os.path.join(root, prefix))
    left_out.update("images outside of class folders" for file in files if _is_image(file))
    for folder in folders:
        files = _files_below(root, prefix + folder)
        left_out.update(f"{os.path.splitext(file)[1]!r} files" for file in files if not _is_image(file))
        images = [file for file in files if _is_image(file)]
        if images:
            # The same letters may be spelled in two ways, as macOS and others do.
            classes.setdefault(_as_text(folder), []).extend(images)
        else:
            left_out[f"folder {prefix + folder!r} without images"] += 1
    return {name: sorted(images, key=_rank) for name, images in sorted(classes.items())}


def _as_text(name: str) -> str:
    # Bytes that are no UTF-8, as in names from old archives, cannot be written to a file.
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _files_below(root: str, folder: str) -> list[str]:
    """All files in a folder below root and in those in it, links followed; relative to root, with "/"."""
    found, waiting, seen = [], [folder], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real not in seen:  # links may lead in a circle
            seen.add(real)
            folders, files = _list(real)
            waiting += [f"{folder}/{name}" for name in folders]
            found += [f"{folder}/{name}" for name in files]
    return found


def _list(folder: str) -> tuple[list[str], list[str]]:
    """The names of folders and of files in a folder, sorted, without hidden ones; a broken link is a file."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _LEFT_BEHIND:
                continue
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif entry.is_symlink() or entry.is_file():
                files.append(entry.name)
    return sorted(folders), sorted(files)


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in _image_suffixes()


@functools.cache
def _image_suffixes() -> set[str]:
    known = Image.registered_extensions().items()
    return {suffix for suffix, name in known if name in Image.OPEN and name not in _NOT_PIXELS}


def _rank(file: str) -> bytes:
    return hashlib.blake2b(os.fsencode(unicodedata.normalize("NFC", file)), digest_size=8).digest()


def _find(splits: Collection[str], name: str) -> str | None:
    return next((found for found in _SPLITS.get(name, ()) if found in splits), None)
