"""Remembers which image files could be used, so that the next start need not read them all again."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import PIL

import mlpmixer_flax
from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.data.notes import Note
from mlpmixer_flax.reading import read_json
from mlpmixer_flax.remote import cache_dir

# What decides whether an image can be used
_READER = f"mlpmixer-flax {mlpmixer_flax.__version__}, Pillow {PIL.__version__}"


class Checked(NamedTuple):
    """A file as it was when its image could be used. A file that has changed since is another one."""

    size: int  # in bytes
    changed_ns: int  # when the file was changed last, in nanoseconds since 1970
    notes: tuple[str, ...]  # names of Note
    content: str = ""  # hash of the content, if the file was compared with others of its size


def look_at(path: str) -> tuple[int, int]:
    """Returns size and time of change of a file, as in `Checked`; (-1, -1) if there is no such file."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def read_checked(root: str) -> dict[str, Checked]:
    """Returns file -> how it was checked, for the files below `root`; {} if none were, or by another reader."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        stored = read_json(_file_for(root))
        if stored["reader"] == _READER:
            found = {
                file: Checked(int(size), int(changed_ns), tuple(notes), str(content))
                for file, (size, changed_ns, notes, content) in stored["files"].items()
            }
            if {note for checked in found.values() for note in checked.notes} <= {note.name for note in Note}:
                return found
    return {}


def write_checked(root: str, checked: Mapping[str, Checked]) -> None:
    """Stores what `read_checked` returns; without a place for files, nothing is stored."""
    with contextlib.suppress(UserError, OSError):
        file = _file_for(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as opened:
            opened.write(json.dumps({"reader": _READER, "root": root, "files": checked}).encode())


def _file_for(root: str) -> Path:
    name = hashlib.sha256(root.encode(errors="surrogateescape")).hexdigest()[:24]
    return cache_dir() / "checked-images" / f"{name}.json"
