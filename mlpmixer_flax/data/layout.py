"""Finds the splits and the classes of a folder of images: which subfolder is what.

Images are recognised as `files` says, classes and splits by the names of folders.
"""

import dataclasses
import os
import re
import unicodedata
from collections import Counter

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import advice, files_below, has_image_suffix, is_image, list_folder, suffix_of
from mlpmixer_flax.text import listed, quoted

Classes = dict[str, list[str]]  # class -> its images, relative to the root, with "/" on every system

LAYOUT = "PATH/<class>/*.jpg, or PATH/train/<class>/*.jpg and PATH/test/<class>/*.jpg"

# Words in the names of folders that people use for splits.
_WORDS: dict[str, str] = dict.fromkeys(("train", "training", "trn", "trainval"), "train")
_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development"), "validation")
_WORDS |= dict.fromkeys(("test", "testing", "tst"), "test")
# Archives use these words for either: they mean test, or validation if another folder is the test split.
_WORDS |= dict.fromkeys(("eval", "evaluation", "holdout"), "eval")
# Words that may stand beside them: "train_images", "test-set", "val2017", "raw_train".
_FILLERS = set(
    "set sets data dataset split splits image images img imgs picture pictures photo photos pic pics sample samples "
    "file files folder dir raw new final full small cropped resized processed original v px".split()
)
_COMPOUND = re.compile(r"(\w+?)(?:sets?|data|dataset|splits?|images?|imgs?|photos?|folder|dir)")
_USUAL = {"train", "validation", "valid", "val", "test"}  # these need no note


@dataclasses.dataclass(frozen=True)
class Layout:
    """The splits and classes of a folder, as they are on disk."""

    splits: dict[str, Classes]  # "train", "validation" and "test", as far as they exist
    folders: dict[str, str]  # split -> the folder with its classes below the root: "" or ending in "/"
    names: dict[str, str]  # the name of each split's folder -> split; {} if there are only classes
    notes: list[str]  # facts that the user should know


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Counts of what a user should know about."""

    suffixes: Counter[str] = dataclasses.field(default_factory=Counter)  # of files left out
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)  # all other things left out
    by_content: Counter[str] = dataclasses.field(default_factory=Counter)  # suffixes of images nobody expects


def find_layout(path: str, root: str) -> Layout:
    """Finds the splits and classes below `root`; `path` is its name in messages.

    Raises:
      UserError: the layout is wrong or ambiguous.
      OSError: a folder cannot be read.
    """
    seen = _Seen()
    start = _skip_wrappers(root)
    folders = _find_splits(path, root, start, seen)
    splits = {}
    for split, folder in folders.items():
        splits[split] = _read_classes(root, folder, seen)
        _check_subfolders(path, folder, splits[split])
    names = {f.removeprefix(start).split("/")[0]: split for split, f in folders.items() if f != start}
    return Layout(splits, folders, names, _notes(path, start, names, seen))


def _notes(path: str, start: str, names: dict[str, str], seen: _Seen) -> list[str]:
    notes = []
    if start:
        notes.append(f"{path!r} is read from its folder {start!r}")
    unusual = [f"{name!r} is {split!r}" for name, split in names.items() if name.lower() not in _USUAL]
    if unusual:
        notes.append(f"splits of {path!r}: {', '.join(unusual)}")
    if seen.by_content:
        files = [f"{suffix!r} files ({count:,})" for suffix, count in seen.by_content.items()]
        notes.append(f"used in {path!r}, because they are images by their content: {listed(files)}")
    files = [f"{suffix!r} files ({count:,})" for suffix, count in seen.suffixes.items()]
    files += [f"{what} ({count:,})" for what, count in seen.left_out.items() if count]
    if files:
        notes.append(f"left out of {path!r}: {listed(files)}")
    return notes + list(filter(None, [advice(seen.suffixes)]))


def split_of(name: str) -> str | None:
    """Returns the split that a name stands for without doubt: "Training" -> "train", "dev" -> "validation"."""
    if not re.fullmatch(r"[^\W\d]+(?:[ -][^\W\d]+)*", name):
        return None
    split, others = _split_and_others(name)
    return split if split != "eval" and not others else None


# --- splits


def _split_and_others(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Returns the split that is named in a folder's name, if it is one, and the words that say something else.

    "seg_train" -> ("train", ("seg",)), "TrainingSet" -> ("train", ()), "test_train" -> (None, ...).
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFC", name)).casefold()
    text = re.sub(r"h[eo]ld[\W_]*out", "holdout", text)
    splits, others = set(), []
    for word in re.findall(r"[^\W\d_]+", text):
        compound = _COMPOUND.fullmatch(word)
        if word in _WORDS:
            splits.add(_WORDS[word])
        elif compound and compound[1] in _WORDS:
            splits.add(_WORDS[compound[1]])
        elif word not in _FILLERS:
            others.append(word)
    if splits == {"train", "validation"}:  # "train_val" is for training, with a test split beside it
        splits = {"train"}
    return splits.pop() if len(splits) == 1 else None, tuple(others)


def _find_splits(path: str, root: str, start: str, seen: _Seen) -> dict[str, str]:
    """Returns split -> the folder of its classes below root: `start`, or ending in "/".

    Counts the other folders, and the images beside the splits.
    """
    folders, images = _list_images(root, start)
    if not folders:
        if images:
            raise UserError(
                f"folder {path!r} has images but no class folders: use its parent, "
                f"folder:{os.path.dirname(root)}, if that has the layout {LAYOUT}"
            )
        raise UserError(f"folder {path!r} has no class folders: the expected layout is {LAYOUT}")
    named = _named_splits(folders)
    if len(folders) == 1 and not named and _holds_classes(root, start + folders[0]):
        named = _named_splits(folders, alone=True)
    # A folder with its own images is a class, whatever its name: a model may have to tell trains from buses.
    found = {name: split for name, split in named.items() if _holds_classes(root, start + name)}
    if not found and len(named) < len(folders):
        return {"train": start}
    if not found or ("train" not in found.values() and "train" in named.values()):
        raise UserError(
            f"folder {path!r} has {quoted(named)}, but no 'train' that contains class folders and no images: "
            f"the expected layout is {LAYOUT}"
        )
    chosen = _one_folder_each(path, root, start, found)
    seen.left_out.update(
        f"folder {start + name!r} beside the splits" for name in folders if name not in chosen.values()
    )
    seen.left_out["images outside of class folders"] += images
    return {split: _skip_nested(root, start + name, split) for split, name in chosen.items()}


def _named_splits(folders: list[str], *, alone: bool = False) -> dict[str, str]:
    """Returns folder -> split, for the folders whose names say so.

    Other words in a name make it doubtful: "test_tube". So "seg_train" is a split only beside "seg_test", or if
    it is `alone`.
    """
    named = {name: _split_and_others(name) for name in folders}
    kinds = {}  # the other words -> the splits named with them
    for split, others in named.values():
        kinds.setdefault(others, set()).update({split} - {None})
    found = {
        name: split
        for name, (split, others) in named.items()
        if split and (not others or len(kinds[others]) > 1 or alone)
    }
    other = {"test", "validation"} - set(found.values())
    either = "validation" if other == {"validation"} else "test"
    return {name: either if split == "eval" else split for name, split in found.items()}


def _one_folder_each(path: str, root: str, start: str, found: dict[str, str]) -> dict[str, str]:
    """Returns split -> its folder; where there are two, a folder without an image does not count."""
    chosen = {}
    for split in ("train", "validation", "test"):
        names = [name for name, its_split in found.items() if its_split == split]
        if len(names) > 1:
            names = [name for name in names if _holds_images(root, start + name)] or names
        if len(names) > 1:
            raise UserError(
                f"folder {path!r} has {quoted(names)}, and two of these are the same split, {split!r}: "
                "rename or remove one"
            )
        if names:
            chosen[split] = names[0]
    return chosen


def _skip_wrappers(root: str) -> str:
    """Returns the folder below root that holds splits or classes: "" or ending in "/".

    An unpacked archive often has a folder of its own around them: photos/photos/<class>.
    """
    folder = ""
    while True:
        folders, images = _list_images(root, folder)
        if len(folders) != 1 or images or _split_and_others(folders[0])[0]:
            return folder
        if not _holds_classes(root, folder + folders[0]):
            return folder
        folder += f"{folders[0]}/"


def _skip_nested(root: str, folder: str, split: str) -> str:
    """Returns the folder of a split's classes, ending in "/": seg_train/seg_train/ or train/images/ for these."""
    while True:
        folders, images = _list_images(root, folder)
        if len(folders) != 1 or images or not _holds_classes(root, f"{folder}/{folders[0]}"):
            return f"{folder}/"
        named, others = _split_and_others(folders[0])
        same = folders[0].casefold() == folder.rpartition("/")[2].casefold()
        if not (same or named == split or (named is None and not others)):
            return f"{folder}/"
        folder = f"{folder}/{folders[0]}"


def _holds_classes(root: str, folder: str) -> bool:
    folders, images = _list_images(root, folder)
    return bool(folders) and not images


def _holds_images(root: str, folder: str) -> bool:
    return any(is_image(os.path.join(root, file)) for file in files_below(root, folder))


# --- classes


def _read_classes(root: str, prefix: str, seen: _Seen) -> Classes:
    """Returns class -> its images below root; counts all other files."""
    classes = {}
    folders, images = _list_images(root, prefix)
    seen.left_out["images outside of class folders"] += images
    for folder in folders:
        images = []
        for file in files_below(root, prefix + folder):
            if is_image(os.path.join(root, file)):
                images.append(file)
                if not has_image_suffix(file):
                    seen.by_content[suffix_of(file)] += 1
            else:
                seen.suffixes[suffix_of(file)] += 1
        if images:
            # Unicode can spell the same letter in two ways; macOS and other systems choose differently.
            classes.setdefault(_as_text(folder), []).extend(images)
        else:
            seen.left_out[f"folder {prefix + folder!r} without images"] += 1
    return classes


def _check_subfolders(path: str, prefix: str, classes: Classes) -> None:
    """Raises UserError if all classes hold the same subfolders: then splits or classes were taken for the other.

    One common subfolder is fine: Tiny ImageNet has its images in <class>/images.
    """
    held = {
        name: {"/".join(file.removeprefix(prefix).split("/")[1:-1][:1]) for file in files}
        for name, files in classes.items()
    }
    if len(held) < 2 or any("" in subfolders for subfolders in held.values()):
        return
    common, union = set.intersection(*held.values()), set.union(*held.values())
    if len(common) < 2 or 2 * len(common) < len(union):
        return
    if all(_split_and_others(name)[0] for name in common):
        remedy = "put the splits outside: PATH/train/<class> and PATH/test/<class>"
    else:
        remedy = (
            "if the outer folders are splits, rename them to train, validation and test; if they are classes, "
            "move their images out of the subfolders"
        )
    raise UserError(
        f"folder {path!r} has the folders {quoted(held, 5)}, and all of them hold the same subfolders "
        f"{quoted(common, 5)}, so it is unclear which are the classes: {remedy}"
    )


def _list_images(root: str, folder: str) -> tuple[list[str], int]:
    """Returns the folders in a folder of root, and the number of images in it."""
    folders, files = list_folder(os.path.join(root, folder))
    return folders, sum(is_image(os.path.join(root, folder, file)) for file in files)


def _as_text(name: str) -> str:
    # Names from old archives may have bytes that are not UTF-8, which cannot be written to a text file.
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
