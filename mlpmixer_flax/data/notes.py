"""Collects what is odd about images that are used all the same, so that it is said once and not per image."""

import enum
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm


class Note(enum.Enum):
    """Something odd about an image; the value is a sentence, in which {} stands for the images."""

    METADATA = (
        "ignored the metadata (EXIF, colour profile, text) of {}, because it is damaged or too large: the pixels "
        "are used, turned as they are stored if the orientation cannot be read"
    )
    WHITE_255 = "took 255 for white in {}: they do not say what is white, and no level is above 255"
    WHITE_4095 = "took 4095 for white in {}: they do not say what is white, and no level is above 4095"
    WHITE_65535 = "took 65535 for white in {}: they do not say what is white, and levels are above 4095"


WHITES = {255: Note.WHITE_255, 4095: Note.WHITE_4095, 65535: Note.WHITE_65535}

_said: set[Note] = set()  # by `say_once`, in this process
_lock = threading.Lock()


def summarize(found: Mapping[str, Iterable[Note]]) -> list[str]:
    """Returns one sentence per kind of note about the images of a folder, for any number of images.

    Args:
      found: file -> its notes.
    """
    files: dict[Note, list[str]] = {}
    for file, notes in found.items():
        for note in notes:
            files.setdefault(note, []).append(file)
    mixed = [note for note in WHITES.values() if note in files]
    # An image with all 16 bits is nothing to talk about, unless the other images are scaled differently.
    told = [note for note in Note if note in files and (note != Note.WHITE_65535 or len(mixed) > 1)]
    lines = [note.value.format(_count(files[note])) for note in told]
    if len(mixed) > 1:
        lines.append(
            "so these images are scaled differently, and dark ones may come out too bright: if all are from one "
            "camera, save them with 8 bits on one scale"
        )
    return lines


def _count(files: Sequence[str]) -> str:
    return f"{len(files):,} image{'s' * (len(files) > 1)}, for example {min(files)!r}"


def say_once(notes: Iterable[Note], name: str) -> None:
    """Prints on stderr each kind of note that this process has not printed yet, with the name of the image."""
    for note in notes:
        with _lock:
            new = note not in _said and note != Note.WHITE_65535
            _said.add(note)
        if new:
            text = note.value.format(f"{name} and others like it, which are not listed")
            tqdm.write(text, file=sys.stderr)  # not print, because a progress bar may be on the screen
