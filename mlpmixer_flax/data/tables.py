"""Tables of labelled images as datasets: CSV or Parquet with the columns file, label or labels, and split.

    file,label,split              file,labels,split
    cats/1.jpg,cat,train          beach/1.jpg,sea|sand,train
    dogs/7.jpg,dog,test           beach/2.jpg,,test

Names of files are relative to the table. The column "labels" has any number of labels per image, separated by "|";
"label" has one. Without the column "split", all images are for training, and a fifth of them for validation.
"""

import csv
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import local_path
from mlpmixer_flax.data.folders import FIFTH, hash_of
from mlpmixer_flax.data.layout import split_of
from mlpmixer_flax.data.listing import LabelledFile, Listing
from mlpmixer_flax.data.parquet import read_columns
from mlpmixer_flax.faults import check_reachable, in_one_line, pass_on
from mlpmixer_flax.limits import show
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.remote import copy_of
from mlpmixer_flax.text import listed, quoted

_COLUMNS = ("file", "label", "labels", "split")
SEPARATOR = "|"  # between the labels of an image
FORM = "the expected columns are file, label (or labels, separated by '|') and split"
_LARGEST_BYTES = 2**30  # of a file; the table is read into memory
_MOST_CLASSES = 100_000
_LONGEST = 1000  # characters of a name
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SPLITS = ("train", "validation", "test")


def is_table(path: str) -> bool:
    """Returns whether the name of a file ends as that of a table does."""
    return os.path.splitext(path)[1].lower() in _READERS


def read_table(path: str | os.PathLike[str]) -> Listing:
    """Reads a table, but opens no image.

    If there are training images and no validation images, about a fifth of them becomes split "validation": those
    whose names have a hash in the lowest fifth, as in `folders.read_folder`. At least one image of each class stays
    in split "train".

    Raises:
      UserError: the file does not exist, is neither CSV nor Parquet, or cannot be read; a column is missing; or a row
        cannot be used: the message has its line.
    """
    path = os.fspath(path)
    if copy_of(path):
        raise UserError(
            f"table {path!r} is remote: copy it and its images to this machine, and give the path there"
        )
    file = os.path.abspath(local_path(path, name="table"))
    if not is_table(path):
        raise UserError(f"table {path!r} is neither .csv nor .parquet: save it as one of them")
    try:
        return _read(path, file)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        pass_on(error, file)
        check_reachable(file)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"table {path!r} cannot be read ({reason}): give a file such as table:labels.csv"
        ) from None


def _read(path: str, file: str) -> Listing:
    if os.path.getsize(file) > _LARGEST_BYTES:
        raise UserError(
            f"table {path!r} has more than {_LARGEST_BYTES:,} bytes: divide it, or give a smaller one"
        )
    with open_file(file) as opened:
        content = opened.read()
    columns, rows = _READERS[os.path.splitext(path)[1].lower()](content, path)
    multi_label = _check_columns(columns, path)
    splits = _splits(rows, path, multi_label=multi_label, has_split="split" in columns)
    others = [name for name in columns if name not in _COLUMNS]
    notes = [f"columns of {path!r} that are not used: {quoted(others, 5)}"] if others else []
    if not multi_label and any(
        SEPARATOR in name for rows in splits.values() for row in rows for name in row.classes
    ):
        notes.append(
            f"labels of {path!r} with {SEPARATOR!r} are one class each: for several labels per image, call the column 'labels'"
        )
    if "train" in splits and "validation" not in splits:
        splits["train"], splits["validation"] = _cut(splits["train"])
        count = len(splits["validation"])
        notes.append(
            f"{path!r} has no validation images: about a fifth of the images, {count:,} chosen by a hash of their names, "
            "becomes split 'validation'; at least one image of each class stays in 'train'"
        )
    if "test" not in splits:
        notes.append(f"{path!r} has no test images: split 'test' is 'validation'")
    listing = Listing(
        kind="table",
        path=path,
        root=os.path.dirname(file),
        form=FORM,
        splits={name: splits[name] for name in _SPLITS if splits.get(name)},
        other_names={},
        notes=notes,
        multi_label=multi_label,
    )
    number = len(listing.class_names)
    if not 0 < number <= _MOST_CLASSES:
        raise UserError(f"table {path!r} has {number:,} classes: give from 1 to {_MOST_CLASSES:,}")
    return listing


# --- files: each reader returns the names of the columns, and yields (place for messages, row by column)

_Rows = Iterator[tuple[str, dict[str, Any]]]


def _read_csv(content: bytes, path: str) -> tuple[list[str], _Rows]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line:,} of {path!r} is not UTF-8: save the table as CSV in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def lines() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(
                f"line {reader.line_num:,} of {path!r} cannot be read ({error}): correct the line"
            ) from None

    each = lines()
    columns = [name.strip() for name in next(each, [])]

    def rows() -> _Rows:
        for fields in each:
            if not fields:  # an empty line
                continue
            place = f"line {reader.line_num:,} of {path!r}"
            if len(fields) != len(columns):
                raise UserError(
                    f"{place} has {len(fields)} fields, but the first line {len(columns)}: write one for each column, and quote "
                    "text with commas"
                )
            yield place, dict(zip(columns, fields, strict=True))

    return columns, rows()


def _read_parquet(content: bytes, path: str) -> tuple[list[str], _Rows]:
    try:
        columns, found = read_columns(content, _COLUMNS, most_bytes=_LARGEST_BYTES)
    except Exception as error:  # of any class
        pass_on(error, path)
        reason = in_one_line(error)
        raise UserError(f"table {path!r} cannot be read ({reason}): write it again") from None

    def rows() -> _Rows:
        for number, values in enumerate(zip(*found.values(), strict=True), 1):
            yield f"row {number:,} of {path!r}", dict(zip(found, values, strict=True))

    return columns, rows()


_READERS = {".csv": _read_csv, ".parquet": _read_parquet}


# --- rows


def _check_columns(columns: list[str], path: str) -> bool:
    """Returns whether images have several labels; raises UserError if a column is missing or there twice."""
    twice = [name for name, times in Counter(columns).items() if times > 1]
    missing = "file" not in columns or ("label" in columns) == ("labels" in columns)
    if missing or twice:
        found = listed([show(name) for name in columns]) or "none"
        raise UserError(
            f"table {path!r} has the columns {found}, {'one of them twice' if twice and not missing else 'and not those needed'}: "
            f"{FORM}, separated by commas"
        )
    return "labels" in columns


def _splits(rows: _Rows, path: str, *, multi_label: bool, has_split: bool) -> dict[str, list[LabelledFile]]:
    """Returns split -> its images, after a check of every row."""
    splits: dict[str, list[LabelledFile]] = {}
    places: dict[str, str] = {}  # of each file
    names: dict[
        str, str
    ] = {}  # each label as in the table -> its name; a table may repeat it a million times
    for place, row in rows:
        file = _file(row["file"], place)
        if file in places:
            raise UserError(f"{place} has {show(file)} again, as {places[file]}: give each image one row")
        places[file] = place
        split = split_of(str(row["split"]).strip()) if has_split else "train"
        if split is None:
            raise UserError(
                f"{place} has split {show(row['split'])}, which is unknown: use {', '.join(_SPLITS)}"
            )
        found = row["labels" if multi_label else "label"]
        if multi_label and (isinstance(found, str) or found is None):
            found = found.split(SEPARATOR) if found and found.strip() else []
        each = found if multi_label and isinstance(found, (list, tuple)) else [found]
        for name in each:
            if not isinstance(name, str) or name not in names:
                names[str(name)] = _name(name, "label", place)
        classes = dict.fromkeys(names[str(name)] for name in each)  # without repetitions
        splits.setdefault(split, []).append(LabelledFile(file, tuple(classes)))
    if not splits:
        raise UserError(f"table {path!r} has no rows: give each image a row")
    return splits


def _name(value: Any, column: str, place: str) -> str:
    """Returns a file name or label as text; raises UserError if it is empty, too long or has control characters."""
    text = unicodedata.normalize("NFC", str(value).strip()) if column == "label" else str(value)
    problems = {
        "is empty": value is None or not text,
        "is neither text nor a whole number": not isinstance(value, (str, int)),
        "is too long": len(text) > _LONGEST,
        "has control characters": _CONTROL.search(text),
    }
    if problem := next((problem for problem, found in problems.items() if found), ""):
        raise UserError(f"{place} has a {column} that {problem} ({show(value)}): correct it")
    return text


def _file(value: Any, place: str) -> str:
    """Returns the name of an image relative to the table."""
    text = _name(value, "file", place)
    file = posixpath.normpath(text)
    if posixpath.isabs(file) or file.split("/")[0] == ".." or file == ".":
        raise UserError(
            f"{place} has file {show(text)}, which is not below the folder of the table: give its path relative to the table"
        )
    return file


def _cut(rows: list[LabelledFile]) -> tuple[list[LabelledFile], list[LabelledFile]]:
    """Returns the training and the validation images; no class loses its last training image."""
    left = Counter(name for row in rows for name in row.classes)
    hashes = {row.file: int.from_bytes(hash_of(row.file)) for row in rows}
    spared = [row for row in rows if all(left[name] > 1 for name in row.classes)]
    # In a small table there may be no low hash: then the lowest one counts.
    limit = max(FIFTH, min((hashes[row.file] + 1 for row in spared), default=0))
    train, validation = [], []
    for row in rows:
        if hashes[row.file] < limit and all(left[name] > 1 for name in row.classes):
            left.subtract(row.classes)
            validation.append(row)
        else:
            train.append(row)
    # If no image has a label and all hashes are low, nothing was left for training.
    return (train, validation) if train else (validation, [])
