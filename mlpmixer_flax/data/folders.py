"""Folders of images as datasets: PATH/<class>/*, or PATH/train/<class>/* with test or val beside it.

Images are recognised by suffix, classes and splits by folder name. Only `FolderRecords` opens files.
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
from mlpmixer_flax.data.source import DatasetInfo

COLOR_SHAPE = (None, None, 3)  # of all images in folders: any size, read in colour
LAYOUT = "PATH/<class>/*.jpg, or PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg"
_VALIDATION = ("validation", "valid", "val")
# Requested split -> the folders that may hold it; the first one that exists is used.
_SPLITS = {"train": ("train",), "test": ("test", *_VALIDATION)} | dict.fromkeys(_VALIDATION, _VALIDATION)
_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_LEFT_BEHIND = {"__MACOSX", "@eaDir"}  # folders that macOS and Synology create, with copies of images
# Pillow knows the suffixes of these formats, but cannot decode them or needs another program for it.
_NOT_PIXELS = set("BUFR EPS GRIB HDF5 MPEG WMF".split())


@dataclasses.dataclass(frozen=True)
class Folder:
    """The contents of a folder of images; file names are relative to `root`, with "/" on every system."""

    path: str  # as the user gave it
    root: str  # absolute
    splits: dict[str, dict[str, list[str]]]  # split -> class -> files in an order that looks random
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

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Returns records {"image": bytes, "label": int, "file_name": str}.

        Raises:
          OSError: a file no longer exists or cannot be read.
        """
        records = []
        for i in indices:
            with open(os.path.join(self.root, self.files[i]), "rb") as file:
                records.append({"image": file.read(), "label": self.labels[i], "file_name": self.files[i]})
        return records


def read_folder(path: str) -> Folder:
    """Finds the classes and splits of a folder; takes about a second for 50,000 files.

    If there are training images and no validation images, a fifth of each class becomes split "validation":
    the images with the lowest hashes of their names below `path`, so the same ones on every machine.

    Raises:
      UserError: the folder does not exist, cannot be read, has the wrong layout or has no images.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise UserError(f"folder {path!r} does not exist: give folder:PATH with the layout {LAYOUT}")
    left_out = Counter()
    try:
        prefixes = _find_splits(path, root, left_out)
        splits = {split: _read_classes(root, prefix, left_out) for split, prefix in prefixes.items()}
    except OSError as error:
        raise UserError(f"folder {path!r} cannot be read ({error}): change its permissions") from error
    counted = ", ".join(f"{what} ({count})" for what, count in left_out.items())
    notes = [f"left out of {path!r}: {counted}"] if left_out else []
    train = splits.get("train")
    if train == {} or not any(splits.values()):
        raise UserError(
            f"folder {path!r} has no images in class folders: the expected layout is "
            f"{'; '.join([LAYOUT, *notes])}"
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


def folder_info(path: str, split: str) -> DatasetInfo:
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


def select_split(folder: Folder, split: str) -> FolderRecords:
    """Returns the images of a split, in an order that gives any slice its share of each class.

    Args:
      folder: from `read_folder`.
      split: "train", "validation" (also "valid" or "val") or "test", which is the validation split if there
        is no test split; slices and sums as in TFDS: "train[:90%]", "train[100:]+validation".

    Raises:
      UserError: the split is unknown or empty, or has a class that the training images do not have.
    """
    labels = {name: label for label, name in enumerate(folder.class_names)}
    chosen = []
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part.strip())
        name = _find(folder.splits, match[1]) if match else None
        if match is None or name is None:
            known = ", ".join(map(repr, sorted({*folder.splits, "test"})))
            raise UserError(
                f"split {split!r} of folder {folder.path!r} is unknown: use {known}, or a slice such as "
                "'train[:90%]'"
            )
        unknown = folder.splits[name].keys() - labels.keys()
        if unknown:
            raise UserError(
                f"split {name!r} of folder {folder.path!r} has classes that the training images do not have: "
                f"{', '.join(map(repr, sorted(unknown)))}; rename or remove them"
            )
        # Spreads every class evenly over the order.
        ordered = sorted(
            ((rank + 0.5) / len(files), labels[name], file)
            for name, files in folder.splits[name].items()
            for rank, file in enumerate(files)
        )
        chosen += ordered[slice(*(_in_examples(end, len(ordered)) for end in match.groups()[1:]))]
    if not chosen:
        raise UserError(
            f"split {split!r} of folder {folder.path!r} has no images: use another slice, or add images"
        )
    return FolderRecords(folder.root, [file for _, _, file in chosen], [label for _, label, _ in chosen])


def images_below(path: str) -> list[str]:
    """Returns the paths of the images in a folder and its subfolders, sorted; each begins with `path`.

    Raises:
      UserError: the folder or a subfolder cannot be read.
    """
    try:
        return sorted(filter(_is_image, _files_below("", path.rstrip("/") or "/")))
    except OSError as error:
        raise UserError(f"folder {path!r} cannot be read ({error}): change its permissions") from error


def _in_examples(end: str | None, count: int) -> int | None:
    if end is None:
        return None
    return round(int(end[:-1]) * count / 100) if end.endswith("%") else int(end)


def _find_splits(path: str, root: str, left_out: Counter[str]) -> dict[str, str]:
    """Returns split -> the folder of its classes below root: "" or ending in "/".

    Adds the other folders to `left_out`.
    """
    folders, files = _list(root)
    if not folders:
        if any(map(_is_image, files)):
            raise UserError(
                f"folder {path!r} has images but no class folders: use its parent, "
                f"folder:{os.path.dirname(root)}, if that has the layout {LAYOUT}"
            )
        raise UserError(f"folder {path!r} has no class folders: the expected layout is {LAYOUT}")
    named = [name for name in folders if name.casefold() in _SPLITS]
    splits = [name for name in named if _holds_classes(os.path.join(root, name))]
    if not splits and named != folders:
        return {"train": ""}
    found = {name.casefold(): f"{name}/" for name in splits}
    if not found or ("train" not in found and "train" in map(str.casefold, named)):
        raise UserError(
            f"folder {path!r} has {', '.join(map(repr, named))}, but no 'train' that contains class folders: "
            f"the expected layout is {LAYOUT}"
        )
    if len(found) < len(splits) or len(found.keys() & _VALIDATION) > 1:
        raise UserError(
            f"folder {path!r} has {', '.join(map(repr, splits))}, and two of these are the same split: "
            "rename one"
        )
    left_out.update(f"folder {name!r} beside the splits" for name in folders if name not in splits)
    return found


def _holds_classes(folder: str) -> bool:
    # A folder with its own images is a class, whatever its name: a model may have to tell trains from buses.
    folders, files = _list(folder)
    return bool(folders) and not any(map(_is_image, files))


def _read_classes(root: str, prefix: str, left_out: Counter[str]) -> dict[str, list[str]]:
    """Returns class -> its images below root, ordered by their hashes; adds all other files to `left_out`."""
    classes = {}
    folders, files = _list(os.path.join(root, prefix))
    left_out.update("images outside of class folders" for file in files if _is_image(file))
    for folder in folders:
        files = _files_below(root, prefix + folder)
        left_out.update(f"{os.path.splitext(file)[1]!r} files" for file in files if not _is_image(file))
        images = [file for file in files if _is_image(file)]
        if images:
            # Unicode can spell the same letter in two ways; macOS and other systems choose differently.
            classes.setdefault(_as_text(folder), []).extend(images)
        else:
            left_out[f"folder {prefix + folder!r} without images"] += 1
    return {name: sorted(images, key=_rank) for name, images in sorted(classes.items())}


def _as_text(name: str) -> str:
    # Names from old archives may have bytes that are not UTF-8, which cannot be written to a text file.
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _files_below(root: str, folder: str) -> list[str]:
    """Returns all files in a folder of root and its subfolders, follows links; relative to root, with "/"."""
    found, waiting, seen = [], [folder], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real not in seen:  # links may form a circle
            seen.add(real)
            folders, files = _list(real)
            waiting += [f"{folder}/{name}" for name in folders]
            found += [f"{folder}/{name}" for name in files]
    return found


def _list(folder: str) -> tuple[list[str], list[str]]:
    """Returns the folders and files in a folder: sorted names, no hidden ones; a broken link is a file."""
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
