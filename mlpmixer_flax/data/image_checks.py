"""Opens folders and tables of images after a check: bad images are found before a long run, and so are copies."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import TypeVar

from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.data.checked import Checked, look_at, read_checked, write_checked
from mlpmixer_flax.data.images import inspect_image
from mlpmixer_flax.data.listing import (
    COLOR_SHAPE,
    FileRecords,
    Listing,
    check_folder,
    select_split,
    split_parts,
)
from mlpmixer_flax.data.notes import Note, summarize
from mlpmixer_flax.data.splits import Source, SplitLike, describe_split
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.text import wrap

Result = TypeVar("Result")


def open_files(
    listing: Listing, splits: Sequence[SplitLike], *, skip_bad_images: bool, for_training: bool
) -> list[Source]:
    """Opens splits of a folder or a table after a check of their images.

    Prints the notes about the listing. With `skip_bad_images`, images that cannot be used are left out, and the first
    of them are listed on stdout. `for_training` says that the splits are those to train and to evaluate on: then the
    images of all splits of the listing are checked, and a line says how many images of a split have the same content
    as images of another split.

    Raises:
      UserError: as `listing.select_split`; images cannot be used and `skip_bad_images` is off (the message lists the
        first of them), or no image of a split can be used; the folder has disappeared; or a listing to train on has
        only one class.
    """
    _print_once(tuple(listing.notes))
    if for_training and len(listing.class_names) < 2 and not listing.multi_label:
        raise UserError(
            f"{listing.kind} {listing.path!r} has training images of one class only: two or more are needed; "
            f"{'; '.join([listing.form, *listing.notes])}"
        )
    chosen = [select_split(listing, split) for split in splits]
    if for_training:
        files = [image.file for images in listing.splits.values() for image in images]
    else:
        files = [file for records in chosen for file in records.files]
    stamps = {file: look_at(os.path.join(listing.root, file)) for file in files}
    flaws, checked = _inspect(listing.root, stamps, contents=for_training)
    if flaws and not skip_bad_images:
        option = "--config.skip_bad_images=true" if for_training else "--skip_bad_images"
        begun = "; a run that has begun needs all of its images, so restore them" if for_training else ""
        raise UserError(
            f"{len(flaws):,} of {len(stamps):,} images in {listing.path!r} cannot be used: repair or delete them, "
            f"or leave them out with {option}{begun}:{_list(flaws, 20)}"
        )
    notes = {file: {Note[name] for name in one.notes} for file, one in checked.items() if one.notes}
    _print_once(tuple(summarize(notes)))
    if for_training:
        contents = {file: one.content for file, one in checked.items() if one.content}
        groups = _groups(listing, splits, [records.files for records in chosen])
        _print_once(tuple(_duplicate_notes(groups, contents)))
    return [
        _usable(listing, split, records, flaws=flaws, stamps=stamps)
        for split, records in zip(splits, chosen, strict=True)
    ]


def _usable(
    listing: Listing,
    split: SplitLike,
    records: FileRecords,
    *,
    flaws: Mapping[str, str],
    stamps: Mapping[str, tuple[int, int]],
) -> Source:
    """Returns a split without the images that cannot be used; prints which these are."""
    bad = {file: flaws[file] for file in records.files if file in flaws}
    say_left_out(bad, len(records), f"split {split!r}")
    good = [pair for pair in zip(records.files, records.labels, strict=True) if pair[0] not in bad]
    return Source(
        name=describe_split(f"{listing.kind}:{listing.path}", split),
        records=FileRecords(
            listing.root,
            files=[file for file, _ in good],
            labels=[label for _, label in good],
            sizes=[stamps[file][0] for file, _ in good],
        ),
        class_names=listing.class_names,
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


# A program may open a folder several times: what it has just said about the folder is not said again.
@functools.lru_cache(maxsize=3)
def _print_once(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(wrap(note))


def _inspect(
    root: str, stamps: Mapping[str, tuple[int, int]], *, contents: bool
) -> tuple[dict[str, str], dict[str, Checked]]:
    """Returns file -> what is wrong with it, if it cannot be used, and file -> how it was checked, if it can.

    Reads the files that have changed since an earlier check, or that could not be used then.

    Args:
      stamps: each file and what `checked.look_at` says of it.
      contents: whether files of equal size must have a hash of their content, which is needed to find copies.
    """
    earlier = read_checked(root)
    good = {file: found for file, found in earlier.items() if stamps.get(file, found[:2]) == found[:2]}
    unknown = [file for file in stamps if file not in good]
    flaws = {}
    for file, (flaw, notes) in _for_each(inspect_image, root, unknown, doing="checking images"):
        if flaw is None:
            good[file] = Checked(*stamps[file], tuple(note.name for note in notes))
        else:
            flaws[file] = flaw
    if flaws:
        check_folder(root)  # otherwise all of its images would seem to be bad
    usable = [file for file in stamps if file in good]
    if contents:
        counts = Counter(good[file].size for file in usable)
        unhashed = [file for file in usable if counts[good[file].size] > 1 and not good[file].content]
        for file, content in _for_each(_hash_content, root, unhashed, doing="looking for copies"):
            good[file] = good[file]._replace(content=content)
    if good != earlier:
        # Files of other splits stay in the list, unless they are gone.
        there = [file for file in good if file in stamps or os.path.exists(os.path.join(root, file))]
        write_checked(root, {file: good[file] for file in there})
    return flaws, {file: good[file] for file in usable}


def _for_each(
    function: Callable[[str], Result], root: str, files: Sequence[str], *, doing: str
) -> Iterator[tuple[str, Result]]:
    """Yields each file and what `function` returns for its path, with a progress bar if it takes long."""
    # Threads are enough: Pillow and hashlib work without holding the interpreter's lock.
    with (
        tqdm(desc=doing, total=len(files), unit="img", delay=2, leave=False, disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        results = pool.map(function, (os.path.join(root, file) for file in files))
        for file, result in zip(files, results, strict=True):
            bar.update()
            yield file, result


def _hash_content(path: str) -> str:
    """Returns a hash of a file's content, "" if it cannot be read any more."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def _groups(
    listing: Listing, splits: Sequence[SplitLike], files: Sequence[list[str]]
) -> dict[str, list[str]]:
    """Returns name -> files of the splits of a run, and between them the splits of the listing that it does not use."""
    used = {part.split for split in splits for part in split_parts(listing, split)}
    unused = {
        f"{name!r}": [image.file for image in images]
        for name, images in listing.splits.items()
        if name not in used
    }
    train, test = ({f"{split!r}": found} for split, found in zip(splits, files, strict=True))
    return train | unused | test


def _duplicate_notes(groups: Mapping[str, Sequence[str]], contents: Mapping[str, str]) -> Iterator[str]:
    """Yields a note for each pair of groups of images that have images of the same content.

    An image that belongs to both groups itself is not counted; `dataset.Dataset.count_overlap` counts these.

    Args:
      groups: name -> files.
      contents: file -> hash of its content, of the files that have the size of another and can be used.
    """
    for (name, files), (other, other_files) in combinations(groups.items(), 2):
        own = set(files)
        originals = {contents[file]: file for file in reversed(files) if file in contents}
        pairs = [
            (file, originals[contents[file]])
            for file in other_files
            if contents.get(file) in originals and file not in own
        ]
        if pairs:
            images = "1 image" if len(pairs) == 1 else f"{len(pairs):,} images"
            yield (
                f"{images} of split {other} {'is' if len(pairs) == 1 else 'are'} also in split {name} (same "
                f"content), for example {pairs[0][0]!r} = {pairs[0][1]!r}: remove one of each, or the scores of "
                f"split {other} are too high"
            )
