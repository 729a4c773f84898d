"""Opens folders and tables of images after a check: bad images are found before a long run, and so are copies."""

import functools
import hashlib
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.data.checked import Checked, look_at, read_checked, write_checked
from mlpmixer_flax.data.images import inspect_image
from mlpmixer_flax.data.listing import (
    COLOR_SHAPE,
    FileRecords,
    Listing,
    check_folder,
    files_of,
    select_split,
    split_parts,
)
from mlpmixer_flax.data.notes import Note, summarize
from mlpmixer_flax.data.splits import Source, SplitLike
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.text import wrap


def open_files(
    listing: Listing,
    split: SplitLike,
    *,
    skip_bad_images: bool,
    for_training: tuple[SplitLike, SplitLike] | None,
) -> Source:
    """Opens a split of a folder or a table after a check of its images.

    Prints the notes about the listing once. With `skip_bad_images`, images that cannot be used are left out, and the
    first of them are listed on stdout. `for_training`, the splits to train and to evaluate on, lets it check the
    images of all splits, and print how many images of a split have the same content as images of another split.

    Raises:
      UserError: as `listing.select_split`; images cannot be used and
        `skip_bad_images` is off (the message lists the first of them); or a listing to train on has only one
        class.
    """
    chosen = select_split(listing, split)
    files = chosen.files
    _print_once(tuple(listing.notes))
    if for_training:
        if len(listing.class_names) < 2 and not listing.multi_label:
            raise UserError(
                f"{listing.kind} {listing.path!r} has training images of one class only: two or more are needed; "
                f"{'; '.join([listing.form, *listing.notes])}"
            )
        files = [file for name in listing.counts() for file in files_of(listing, name)]
    stamps = {file: look_at(os.path.join(listing.root, file)) for file in files}
    flaws, oddities = _inspect(listing.root, tuple(stamps), tuple(stamps.values()))
    if flaws and not skip_bad_images:
        _inspect.cache_clear()  # a notebook user may repair the images and try again
        raise UserError(
            f"{len(flaws):,} of {len(files):,} images in {listing.path!r} cannot be used: repair or delete them, "
            "or leave them out with --skip_bad_images (in training --config.skip_bad_images=true):"
            f"{_list(flaws, 20)}"
        )
    _print_once(tuple(summarize(oddities)))
    if for_training:
        groups = _groups(listing, for_training).items()
        good_groups = tuple((name, tuple(f for f in images if f not in flaws)) for name, images in groups)
        _print_once(_duplicate_notes(listing.root, good_groups))
    bad = {file: flaws[file] for file in chosen.files if file in flaws}
    say_left_out(bad, len(chosen), f"split {split!r}")
    good = [(file, label) for file, label in zip(chosen.files, chosen.labels, strict=True) if file not in bad]
    return Source(
        records=FileRecords(
            listing.root,
            files=[file for file, _ in good],
            labels=[label for _, label in good],
            sizes=[stamps[file][0] for file, _ in good],
        ),
        num_classes=len(listing.class_names),
        image_shape=COLOR_SHAPE,
        remedy="it could be used when it was checked, so restore it if somebody has changed it, and start again",
        skipped=len(bad),
        multi_label=listing.multi_label,
    )


def say_left_out(flaws: dict[str, str], total: int, name: str) -> None:
    """Prints how many of all images of a split are left out, and the first of them.

    Args:
      flaws: image -> why it cannot be used.
      name: of the split.

    Raises:
      UserError: no image is left.
    """
    if len(flaws) == total:
        raise UserError(f"no image of {name} can be used: repair some of them{_list(flaws, 10)}")
    if flaws:
        print(
            f"left out {len(flaws):,} of the {total:,} images of {name}, because they cannot be used:{_list(flaws, 10)}"
        )


def _list(flaws: dict[str, str], limit: int) -> str:
    lines = [f"{file!r}: {flaw}" for file, flaw in sorted(flaws.items())]
    shown = "".join(f"\n  {line}" for line in lines[:limit])
    return shown if len(lines) <= limit else f"{shown}\n  and {len(lines) - limit:,} more"


# A run opens two splits of one folder, and prints all three kinds of notes only once.
@functools.lru_cache(maxsize=3)
def _print_once(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(wrap(note))


# A run opens two splits of one folder. Files that have changed are checked again.
@functools.lru_cache(maxsize=1)
def _inspect(
    root: str, files: tuple[str, ...], stamps: tuple[tuple[int, int], ...]
) -> tuple[dict[str, str], dict[str, set[Note]]]:
    """Returns file -> what is wrong with it, if it cannot be used, and file -> its notes.

    Reads the files that have changed since an earlier check, or that could not be used then.

    Args:
      stamps: of the files, from `checked.look_at`.
    """
    earlier = read_checked(root)
    now = dict(zip(files, stamps, strict=True))
    good = {file: found for file, found in earlier.items() if now.get(file, found[:2]) == found[:2]}
    unknown = [file for file in files if file not in good]
    flaws = {}
    # Threads are enough: Pillow decodes without holding the interpreter's lock.
    with (
        tqdm(
            desc="checking images", total=len(unknown), unit="img", delay=2, leave=False, disable=None
        ) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        found = pool.map(inspect_image, (os.path.join(root, file) for file in unknown))
        for file, (flaw, notes) in zip(unknown, found, strict=True):
            bar.update()
            if flaw is None:
                good[file] = Checked(*now[file], tuple(note.name for note in notes))
            else:
                flaws[file] = flaw
    if flaws:
        check_folder(root)  # otherwise all of its images would seem to be bad
    if good != earlier:
        write_checked(root, good)
    return flaws, {
        file: {Note[name] for name in good[file].notes} for file in files if file in good and good[file].notes
    }


def _groups(listing: Listing, run_splits: tuple[SplitLike, SplitLike]) -> dict[str, list[str]]:
    """Returns name -> files of the splits of a run, and between them the splits of the listing that it does not use."""
    used = {part.split for split in run_splits for part in split_parts(listing, split)}
    train, test = ({f"{split!r}": select_split(listing, split).files} for split in run_splits)
    return (
        train | {f"{name!r}": files_of(listing, name) for name in listing.counts() if name not in used} | test
    )


@functools.lru_cache(maxsize=1)  # as above
def _duplicate_notes(root: str, groups: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[str, ...]:
    """Returns a note for each pair of groups of images that have images of the same content.

    An image that belongs to both groups itself is not counted; `examples.count_overlap` counts these.
    """
    contents = _same_contents(root, sorted({file for _, files in groups for file in files}))
    notes = []
    for (name, files), (other, other_files) in combinations(groups, 2):
        own = set(files)
        originals = {contents[file]: file for file in reversed(files) if file in contents}
        pairs = [
            (file, originals[contents[file]])
            for file in other_files
            if contents.get(file) in originals and file not in own
        ]
        if pairs:
            images = "1 image" if len(pairs) == 1 else f"{len(pairs):,} images"
            notes.append(
                f"{images} of split {other} {'is' if len(pairs) == 1 else 'are'} also in split {name} (same "
                f"content), for example {pairs[0][0]!r} = {pairs[0][1]!r}: remove one of each, or the scores of "
                f"split {other} are too high"
            )
    return tuple(notes)


def _same_contents(root: str, files: list[str]) -> dict[str, bytes]:
    """Returns file -> hash of its content, for the files that have the size of another; the others are unique."""
    by_size = defaultdict(list)
    for file in files:
        by_size[look_at(os.path.join(root, file))[0]].append(file)
    alike = [file for group in by_size.values() if len(group) > 1 for file in group]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = pool.map(_hash_content, (os.path.join(root, file) for file in alike))
        return {file: content for file, content in zip(alike, hashes, strict=True) if content}


def _hash_content(path: str) -> bytes | None:
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return None
