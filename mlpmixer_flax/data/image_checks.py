"""Checks every image of a folder before a long training or evaluation starts."""

import contextlib
import functools
import hashlib
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.data.folders import COLOR_SHAPE, Folder, FolderRecords, read_folder, select_split
from mlpmixer_flax.data.images import inspect_image
from mlpmixer_flax.data.layout import LAYOUT
from mlpmixer_flax.data.notes import Note, summarize
from mlpmixer_flax.data.source import Source
from mlpmixer_flax.data.splits import SplitLike


def open_folder(
    path: str | os.PathLike[str], split: SplitLike, *, skip_bad_images: bool, for_training: bool
) -> Source:
    """Opens a split of a folder after a check of its images (`for_training`: of the images of all splits).

    Prints the notes about the folder once; `for_training` also how many images of a split have the same content
    as images of another split. With `skip_bad_images`, images that cannot be used are left out, and the first of
    them are listed on stdout.

    Raises:
      UserError: as `folders.read_folder` and `folders.select_split`; images cannot be used and
        `skip_bad_images` is off (the message lists the first of them); or a folder to train on has only one
        class.
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


def _checked(folder: Folder, split: SplitLike, *, skip_bad_images: bool, for_training: bool) -> FolderRecords:
    chosen = select_split(folder, split)
    files = chosen.files
    _print_once(tuple(folder.notes))
    by_split = {
        name: [file for images in classes.values() for file in images]
        for name, classes in folder.splits.items()
    }
    if for_training:
        if len(folder.class_names) < 2:
            raise UserError(
                f"folder {folder.path!r} has training images of one class only: two or more are needed; the "
                f"expected layout is {'; '.join([LAYOUT, *folder.notes])}"
            )
        files = [file for images in by_split.values() for file in images]
    flaws, oddities = _inspect(folder.root, tuple(files))
    if flaws and not skip_bad_images:
        _inspect.cache_clear()  # a notebook user may repair the images and try again
        raise UserError(
            f"{len(flaws):,} of {len(files):,} images in {folder.path!r} cannot be used: repair or delete them, "
            "or leave them out with --skip_bad_images (in training --config.skip_bad_images=true):"
            f"{_list(flaws, 20)}"
        )
    _print_once(tuple(summarize(oddities)))
    if for_training:
        good = {name: tuple(f for f in images if f not in flaws) for name, images in by_split.items()}
        _print_once(_duplicate_notes(folder.root, tuple(good.items())))
    bad = {file: flaws[file] for file in chosen.files if file in flaws}
    if not bad:
        return chosen
    print(
        f"left out {len(bad):,} of the {len(chosen):,} images of split {split!r}, because they cannot be used:"
        f"{_list(bad, 10)}"
    )
    kept = [pair for pair in zip(chosen.files, chosen.labels, strict=True) if pair[0] not in bad]
    if not kept:
        raise UserError(
            f"no image of split {split!r} of folder {folder.path!r} can be used: repair some of them"
        )
    return FolderRecords(folder.root, [file for file, _ in kept], [label for _, label in kept])


def _list(flaws: dict[str, str], limit: int) -> str:
    lines = [f"{file!r}: {flaw}" for file, flaw in sorted(flaws.items())]
    shown = "".join(f"\n  {line}" for line in lines[:limit])
    return shown if len(lines) <= limit else f"{shown}\n  and {len(lines) - limit:,} more"


# A run opens two splits of one folder, and prints all three kinds of notes only once.
@functools.lru_cache(maxsize=3)
def _print_once(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(note)


@functools.lru_cache(maxsize=1)  # a run opens two splits of one folder, and the check takes long
def _inspect(root: str, files: tuple[str, ...]) -> tuple[dict[str, str], dict[str, set[Note]]]:
    """Reads all files; returns file -> what is wrong with it, if it cannot be used, and file -> its notes."""
    # Threads are enough: Pillow decodes without holding the interpreter's lock.
    with (
        tqdm(desc="checking images", total=len(files), unit="img", delay=2, leave=False, disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        flaws, oddities = {}, {}
        found = pool.map(inspect_image, (os.path.join(root, file) for file in files))
        for file, (flaw, notes) in zip(files, found, strict=True):
            bar.update()
            if flaw is not None:
                flaws[file] = flaw
            elif notes:
                oddities[file] = notes
    return flaws, oddities


@functools.lru_cache(maxsize=1)  # as above
def _duplicate_notes(root: str, by_split: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[str, ...]:
    """Returns a note for each pair of splits that have images of the same content."""
    contents = _same_contents(root, [file for _, files in by_split for file in files])
    notes = []
    for (name, files), (other, other_files) in combinations(by_split, 2):
        originals = {contents[file]: file for file in reversed(files) if file in contents}
        pairs = [(file, originals[contents[file]]) for file in other_files if contents.get(file) in originals]
        if pairs:
            images = "1 image" if len(pairs) == 1 else f"{len(pairs):,} images"
            notes.append(
                f"{images} of split {other!r} {'is' if len(pairs) == 1 else 'are'} also in split {name!r} (same "
                f"content), for example {pairs[0][0]!r} = {pairs[0][1]!r}: remove one of each, or the scores of "
                f"split {other!r} are too high"
            )
    return tuple(notes)


def _same_contents(root: str, files: list[str]) -> dict[str, bytes]:
    """Returns file -> hash of its content, for the files that have the size of another; the others are unique."""
    by_size = defaultdict(list)
    for file in files:
        with contextlib.suppress(OSError):  # somebody has just deleted it
            by_size[os.path.getsize(os.path.join(root, file))].append(file)
    alike = [file for group in by_size.values() if len(group) > 1 for file in group]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(_hash_content, (os.path.join(root, file) for file in alike))
        return {file: content for file, content in zip(alike, hashes, strict=True) if content}


def _hash_content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None
