"""Finds files and tells what they are: local paths, what is in a folder, which files are images."""

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.remote import copy_of, fetch

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # also s3:/bucket: pathlib turns // into /
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_LEFT_BEHIND = {"__MACOSX", "@eaDir"}  # folders that macOS and Synology create, with copies of images
# Pillow knows these formats, but cannot decode them, or starts another program for it; in an IPTC file it opens a file of
# any format, such as EPS. (Others that hold a whole file, such as ICO and BLP, name its format.)
_NOT_PIXELS = set("BUFR EPS GRIB HDF5 IPTC MPEG WMF".split())
# Files with these suffixes are common beside images. They are not opened to look at their content.
_NOT_IMAGES = set(
    ".txt .json .jsonl .xml .csv .tsv .md .html .yaml .yml .ini .log .py .npy .npz .pkl .mat .pt .db .doc .docx "
    ".xls .xlsx .pdf .svg .zip .tar .gz .mp3 .mp4 .mov .avi .mkv .wav".split()
)
# Programs save copies or parts of an image under these names. A copy could get into another split.
_COPIES = ("~", "_original", *".bak .backup .old .orig .tmp .temp .part .crdownload .thm".split())
# TIFF is left out: photos of most cameras (.nef, .cr2, .dng) begin as a TIFF with a small preview.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
# Suffixes of images that not every machine can read, what they are, and what else to do than to convert them.
_NEWER = (
    ({".heic", ".heics", ".heif", ".heifs", ".hif"}, "HEIC photos", "pip install pillow-heif"),
    ({".avif", ".avifs"}, "AVIF images", "pip install --upgrade pillow"),
)
_SAVE = "save it as JPEG or PNG"
# (where to look, what is there, what the file is, what to do); the first match counts.
_KINDS = [
    (4, rb"ftyp(hei|hev|mif1|msf1)", "a HEIC photo", f"{_SAVE}, or pip install pillow-heif"),
    (4, rb"ftypavi[fs]", "an AVIF image", f"{_SAVE}, or pip install --upgrade pillow"),
    (0, rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", _SAVE),
    (0, rb"....ftypcrx |FUJIFILMCCD-RAW", "a raw file of a camera", _SAVE),
    (0, rb"....ftyp|....moov|RIFF....AVI |\x1aE\xdf\xa3", "a video", "save frames of it as JPEG or PNG"),
    (0, rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", "save it as PNG"),
    (0, rb"%PDF", "a PDF file", "save its pages as images"),
    (257, rb"ustar", "an archive", "unpack it"),
    (128, rb"DICM", "a DICOM file", "save it as PNG or TIFF"),
    (0, rb"\x93NUMPY", "a NumPy array", "load it, and give the array as uint8"),
    (0, rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive", "unpack it"),
    (0, rb"version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
    (0, rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!DOCTYPE svg|svg)", "an SVG drawing", "save it as PNG"),
    (0, rb"(?i)\s*<(!doctype html|html|head|body)", "a web page", "download the image itself"),
]  # fmt: skip

# --- paths


def local_path(path: str | os.PathLike[str], *, name: str) -> str:
    """Returns a path with "~" expanded; of a remote path, such as s3://bucket/photos, that of its copy.

    The remote path is looked up, and copied if it is new or has changed, once per process.

    Args:
      name: what the path is, for the message: "folder", "table" or "image".

    Raises:
      UserError: the path is another URL, such as https://example.org/photos, or the copy cannot be made.
    """
    path = os.fspath(path)
    if copy := copy_of(path):
        return fetch_once(copy)
    check_no_url(path, name=name)
    return os.path.expanduser(path)


@functools.cache
def fetch_once(copy: Path) -> str:
    """Returns the path of a copy, after it has been brought up to date, if this process has not done so already."""
    return str(fetch(copy))


def check_no_url(path: str, *, name: str) -> None:
    """Raises UserError if a path is a URL; `name` says what it is, for the message."""
    if _URL.match(path) and not os.path.lexists(path):
        raise UserError(
            f"{name} {path!r} is a URL, and only local paths and those such as s3://bucket/folder can be used: copy it to "
            "this machine, and give the path there".lstrip()
        )


def absolute(path: str) -> str:
    """Returns a path that is valid from any directory; a remote path as it is."""
    return path if copy_of(path) else os.path.abspath(os.path.expanduser(path))


def is_archive(path: str) -> bool:
    """Returns whether the name of a file ends as the name of an archive does."""
    return path.lower().endswith(_ARCHIVES)


def files_below(root: str, folder: str) -> list[str]:
    """Returns all files in a folder of root and its subfolders, follows links; relative to root, with "/"."""
    found, waiting, seen = [], [folder], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real not in seen:  # links may form a circle
            seen.add(real)
            folders, files = list_folder(real)
            waiting += [f"{folder}/{name}" for name in folders]
            found += [f"{folder}/{name}" for name in files]
    return found


def list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Returns the folders and files in a folder: sorted names, no hidden ones; a broken link is a file."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _LEFT_BEHIND:
                continue
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.name)
            elif entry.is_symlink() or entry.is_file():
                files.append(entry.name)
    return sorted(folders), sorted(files)


# --- images, by name


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


def images_below(path: str | os.PathLike[str]) -> list[str]:
    """Returns the paths of the images in a folder and its subfolders, sorted; each begins with `path`.

    Raises:
      UserError: the folder or a subfolder cannot be read.
    """
    path = os.fspath(path)
    try:
        return sorted(filter(is_image, files_below("", path.rstrip("/") or "/")))
    except OSError as error:
        pass_on(error)
        raise UserError(
            f"folder {path!r} cannot be read ({error}): restore it, or mount its drive again"
        ) from error


def has_image_suffix(path: str) -> bool:
    """Returns whether Pillow can read files with the suffix of this path."""
    return suffix_of(path) in _image_suffixes()


def suffix_of(path: str) -> str:
    """Returns the suffix of a file in lower case: ".jpg", or "" if there is none."""
    return os.path.splitext(path)[1].lower()


def advice(suffixes: Iterable[str]) -> str:
    """Returns what to do about files with these suffixes if this machine cannot read them; "" for nothing."""
    unreadable = set(suffixes) - _image_suffixes()
    for some, kind, remedy in _NEWER:
        if unreadable & some:
            return f"{kind} cannot be read here: convert them to JPEG or PNG, or {remedy}"
    return ""


@functools.cache
def pixel_formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that it decodes by itself; for EPS it would start Ghostscript.

    HEIC is one of them if pillow-heif is installed.
    """
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in Image.OPEN if name not in _NOT_PIXELS)


@functools.cache
def _image_suffixes() -> set[str]:
    formats = set(pixel_formats())
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


# --- other files, by content


class ForeignFile(ValueError):
    """A file in a format that Pillow cannot read here, or too large to be read; the message says what to do."""


def explain(data: bytes) -> str | None:
    """Returns what a file is that Pillow cannot read, and what to do; None if its bytes are not known."""
    for start, pattern, kind, remedy in _KINDS:
        if re.compile(pattern, re.DOTALL).match(data, start):
            if kind == "an AVIF image" and ".avif" in Image.registered_extensions():
                return None  # it is damaged
            return f"it is {kind}, not an image that Pillow can read here: {remedy}"
    if _is_text(data[:4096]):
        return "it is a text file, not an image: give images, and if it lists images, give their names"
    return None


def _is_text(head: bytes) -> bool:
    text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", "replace")
    # Images that are cut short may begin with letters, too. In other encodings, some letters are replaced.
    is_image = len(head) < 8 or re.match(r"GIF8|BM|RIFF|P[1-7]\s|8BPS|II\*|MM", text)
    strange = 4 * text.count("\ufffd") > len(text) or re.search(r"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", text)
    return not is_image and not strange
