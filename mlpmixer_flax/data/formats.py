"""Tells image files from other files: by suffix, or by content if nobody knows the suffix."""

import functools
import os
from collections.abc import Iterable

from PIL import Image

from mlpmixer_flax.data.foreign import read_heic

# Pillow knows the suffixes of these formats, but cannot decode them or needs another program for it.
_NOT_PIXELS = set("BUFR EPS GRIB HDF5 MPEG WMF".split())
# Files with these suffixes are common beside images. They are not opened to look at their content.
_NOT_IMAGES = set(
    ".txt .json .jsonl .xml .csv .tsv .md .html .yaml .yml .ini .log .py .npy .npz .pkl .mat .pt .db .doc .docx "
    ".xls .xlsx .pdf .svg .zip .tar .gz .mp3 .mp4 .mov .avi .mkv .wav".split()
)
# Programs save copies or parts of an image under these names. A copy could get into another split.
_COPIES = (
    "~",
    "_original",
    ".bak",
    ".backup",
    ".old",
    ".orig",
    ".tmp",
    ".temp",
    ".part",
    ".crdownload",
    ".thm",
)
# TIFF is left out: photos of most cameras (.nef, .cr2, .dng) begin as a TIFF with a small preview.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
_HEIC = {".heic", ".heics", ".heif", ".heifs", ".hif"}
_AVIF = {".avif", ".avifs"}


def is_image(path: str) -> bool:
    """Returns whether a file is an image, by its suffix or else by its content.

    The content counts if the suffix is unknown: "photo.jpg?w=200", "photo.0001", "photo". JPEG, PNG, GIF, WebP
    and AVIF are found by their first bytes. Files whose suffix marks a copy, such as ".jpg_original", and files
    that cannot be read are not images.
    """
    if has_image_suffix(path):
        return True
    if suffix_of(path) in _NOT_IMAGES or path.lower().endswith(_COPIES) or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    return (
        start.startswith(_SIGNATURES)
        or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
        or (start[4:] == b"ftypavif" and ".avif" in _image_suffixes())
    )


def has_image_suffix(path: str) -> bool:
    """Returns whether Pillow can read files with the suffix of this path."""
    return suffix_of(path) in _image_suffixes()


def suffix_of(path: str) -> str:
    """Returns the suffix of a file in lower case: ".jpg", or "" if there is none."""
    return os.path.splitext(path)[1].lower()


def advice(suffixes: Iterable[str]) -> str:
    """Returns what to do about files with these suffixes if this machine cannot read them; "" for nothing."""
    suffixes = set(suffixes) - _image_suffixes()
    if suffixes & _HEIC:
        return "HEIC photos cannot be read here: convert them to JPEG or PNG, or pip install pillow-heif"
    if suffixes & _AVIF:
        return "AVIF images cannot be read here: convert them to JPEG or PNG, or pip install --upgrade pillow"
    return ""


@functools.cache
def _image_suffixes() -> set[str]:
    read_heic()
    known = Image.registered_extensions().items()
    return {suffix for suffix, name in known if name in Image.OPEN and name not in _NOT_PIXELS}
