"""Folders of images as datasets: PATH/<class>/*, or PATH/train/<class>/* with test or val beside it.

`layout` says which subfolders are splits and classes. Only the search for images with unknown suffixes opens files.
"""

import bisect
import hashlib
import os
import unicodedata

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import is_archive, local_path
from mlpmixer_flax.data.layout import LAYOUT, Classes, find_layout
from mlpmixer_flax.data.listing import LabelledFile, Listing
from mlpmixer_flax.faults import check_reachable, pass_on
from mlpmixer_flax.text import quoted

_HASH_BYTES = 8
FIFTH = 256**_HASH_BYTES // 5  # images with hashes below this are for validation


def read_folder(path: str | os.PathLike[str]) -> Listing:
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
            name: sorted(files, key=lambda file, prefix=prefix: hash_of(file, prefix))
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
        notes.append(f"{path!r} has no test images: split 'test' is 'validation'")
    return Listing(
        kind="folder",
        path=path,
        root=root,
        form=f"the expected layout is {LAYOUT}",
        splits={split: _mix(classes) for split, classes in splits.items()},
        other_names={name.casefold(): split for name, split in layout.names.items()},
        notes=notes,
        multi_label=False,
    )


def _mix(classes: Classes) -> list[LabelledFile]:
    """Returns the images of a split, in an order that gives any slice its share of each class."""
    ordered = sorted(
        ((rank + 0.5) / len(files), name, file)
        for name, files in classes.items()
        for rank, file in enumerate(files)
    )
    return [LabelledFile(file, (name,)) for _, name, file in ordered]


def _cut(path: str, classes: Classes, prefix: str) -> tuple[Classes, Classes, str]:
    """Returns the training images, the validation images and a note about them.

    The files of each class are in the order of `hash_of`.
    """
    cuts = {}
    for name, files in classes.items():
        below = bisect.bisect_left(files, FIFTH, key=lambda file: int.from_bytes(hash_of(file, prefix)))
        cuts[name] = min(below, len(files) - 1)
    several = [name for name, files in classes.items() if len(files) > 1]
    no_hash_is_low = not any(cuts.values()) and several
    if no_hash_is_low:
        cuts[min(several, key=lambda name: hash_of(classes[name][0], prefix))] = 1
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


def hash_of(file: str, prefix: str = "") -> bytes:
    """Returns a hash of the name of a file below a prefix, the same on every system, and in every form of Unicode."""
    below = unicodedata.normalize("NFC", file.removeprefix(prefix))
    return hashlib.blake2b(os.fsencode(below), digest_size=_HASH_BYTES).digest()
