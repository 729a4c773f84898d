"""Names the files that are not images for Pillow, by their bytes, and says what to do with each."""

import functools
import importlib
import re

from PIL import Image

_SAVE = "save it as JPEG or PNG"
# (where to look, what is there, what the file is, what to do); the first match counts.
_KINDS = [
    (4, rb"ftyp(hei|hev|mif1|msf1)", "a HEIC photo", f"{_SAVE}, or pip install pillow-heif"),
    (4, rb"ftypavi[fs]", "an AVIF image", f"{_SAVE}, or pip install --upgrade pillow"),
    (0, rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL image", _SAVE),
    (0, rb"....ftypcrx |FUJIFILMCCD-RAW", "a raw file of a camera", _SAVE),
    (0, rb"....ftyp|....moov|RIFF....AVI |\x1aE\xdf\xa3", "a video", "save frames of it as JPEG or PNG"),
    (0, rb"%PDF", "a PDF file", "save its pages as images"),
    (128, rb"DICM", "a DICOM file", "save it as PNG or TIFF"),
    (0, rb"\x93NUMPY", "a NumPy array", "load it, and give the array as uint8"),
    (0, rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "an archive", "unpack it"),
    (0, rb"version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
    (0, rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!DOCTYPE svg|svg)", "an SVG drawing", "save it as PNG"),
    (0, rb"(?i)\s*<(!doctype html|html|head|body)", "a web page", "download the image itself"),
]  # fmt: skip


class ForeignFile(ValueError):
    """A file in a format that Pillow cannot read here; the message says which one, and what to do."""


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


@functools.cache
def read_heic() -> bool:
    """Lets Pillow read HEIC photos if pillow-heif is installed; returns whether it is."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True
