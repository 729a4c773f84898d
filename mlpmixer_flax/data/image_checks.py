"""Checks every image of a folder before a long training or evaluation starts."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.data.folders import COLOR_SHAPE, LAYOUT, Folder, FolderRecords, read_folder, select_split
from mlpmixer_flax.data.images import find_flaw
from mlpmixer_flax.data.source import Source


def open_folder(path: str, split: str, *, skip_bad_images: bool, for_training: bool) -> Source:
    """Opens a split of a folder after a check of its images (`for_training`: of the images of all splits).

    With `skip_bad_images`, images that cannot be used are left out and listed on stdout.

    Raises:
      UserError: as `folders.read_folder` and `folders.select_split`; images cannot be used and
        `skip_bad_images` is off (the message lists all of them); or a folder to train on has only one class.
    """
    folder = read_folder(path)
    records = _checked(folder, split, skip_bad_images=skip_bad_images, for_training=for_training)
    return Source(
        records=records,
        image_key="image",
        label_key="label",
        num_classes=len(folder.class_names),
        image_shape=COLOR_SHAPE,
    )


def _checked(folder: Folder, split: str, *, skip_bad_images: bool, for_training: bool) -> FolderRecords:
    chosen = select_split(folder, split)
    files = chosen.files
    _print_once(tuple(folder.notes))
    if for_training:
        if len(folder.class_names) < 2:
            raise UserError(
                f"folder {folder.path!r} has training images of one class only: two or more are needed; the "
                f"expected layout is {'; '.join([LAYOUT, *folder.notes])}"
            )
        files = [file for classes in folder.splits.values() for images in classes.values() for file in images]
    flaws = _find_flaws(folder.root, tuple(files))
    if flaws and not skip_bad_images:
        _find_flaws.cache_clear()  # a notebook user may repair the images and try again
        raise UserError(
            f"{len(flaws)} of {len(files):,} images in {folder.path!r} cannot be used: repair or delete them, "
            "or leave them out with --skip_bad_images (in training --config.skip_bad_images=true):"
            f"{_list(flaws)}"
        )
    bad = {file: flaws[file] for file in chosen.files if file in flaws}
    if not bad:
        return chosen
    print(
        f"left out {len(bad)} of the {len(chosen)} images of split {split!r}, because they cannot be used:"
        f"{_list(bad)}"
    )
    kept = [pair for pair in zip(chosen.files, chosen.labels, strict=True) if pair[0] not in bad]
    if not kept:
        raise UserError(
            f"no image of split {split!r} of folder {folder.path!r} can be used: repair some of them"
        )
    return FolderRecords(folder.root, [file for file, _ in kept], [label for _, label in kept])


def _list(flaws: dict[str, str]) -> str:
    return "".join(f"\n  {file!r}: {flaw}" for file, flaw in sorted(flaws.items()))


@functools.lru_cache(maxsize=1)  # a run opens two splits of one folder, and each note is printed only once
def _print_once(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(note)


@functools.lru_cache(maxsize=1)  # a run opens two splits of one folder, and the check takes long
def _find_flaws(root: str, files: tuple[str, ...]) -> dict[str, str]:
    """Returns file -> what is wrong with it, for each file that cannot be used; reads all files."""
    # Threads are enough: Pillow decodes without holding the interpreter's lock.
    with (
        tqdm(desc="checking images", total=len(files), unit="img", delay=2, leave=False, disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        flaws = {}
        found = pool.map(find_flaw, (os.path.join(root, file) for file in files))
        for file, flaw in zip(files, found, strict=True):
            bar.update()
            if flaw is not None:
                flaws[file] = flaw
    return flaws
