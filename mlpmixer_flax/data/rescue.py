"""Finds the whole pixels in a file that Pillow refuses because of its metadata."""

import re
import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND"}
# The tags of TIFF 6.0 and libtiff that say how pixels are stored, and which level is white.
_TIFF_PIXELS = {
    *range(254, 263), 266, 273, *range(277, 282), 284, 292, 293, *range(317, 326), *range(332, 348), *range(512, 533)
}  # fmt: skip
_TIFF_ORIENTATION = 274


def without_metadata(data: bytes) -> Iterator[bytes]:
    """Yields the file with its EXIF data but without other metadata, then without both.

    Pillow refuses a file if a text chunk is too large or a tag is damaged, although the pixels are whole. This
    knows PNG, JPEG, TIFF and AVIF, and yields nothing for other formats.
    """
    for keep_exif in (True, False):
        if data.startswith(_PNG):
            yield _bare_png(data, keep_exif)
        elif data.startswith(b"\xff\xd8"):
            yield _bare_jpeg(data, keep_exif)
        elif data[:4] in (b"II*\0", b"MM\0*"):
            yield _bare_tiff(data, keep_exif)
        elif data[4:12] in (b"ftypavif", b"ftypavis") and not keep_exif:
            # The decoder does not look for the EXIF item under an unknown type.
            yield re.sub(rb"(infe[\2\3].{3}.{4,6})Exif", rb"\1skip", data, flags=re.DOTALL)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the type and the content of each chunk of a PNG file; the last one may be cut short."""
    at = len(_PNG)
    while data.startswith(_PNG) and at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + 8 + length]
        at += length + 12


def _bare_png(data: bytes, keep_exif: bool) -> bytes:
    kept, at = [_PNG], len(_PNG)
    for kind, content in png_chunks(data):
        chunk = data[at : at + len(content) + 12]
        at += len(chunk)
        whole = chunk[-4:] == zlib.crc32(kind + content).to_bytes(4)
        if kind in _PNG_PIXELS or (keep_exif and kind == b"eXIf" and whole):
            kept.append(chunk)
    return b"".join(kept)


def _bare_jpeg(data: bytes, keep_exif: bool) -> bytes:
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):  # up to the pixels
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4]) + 2
        segment = data[at : at + length]
        at += length
        is_metadata = 0xE0 <= kind <= 0xEF or kind == 0xFE
        # JFIF and Adobe say how colours are stored; libjpeg ignores those that are shorter than this.
        colours = (kind == 0xE0 and len(segment) >= 18) or (kind == 0xEE and len(segment) >= 16)
        exif = keep_exif and kind == 0xE1 and segment[4:10] == b"Exif\0\0"
        if not is_metadata or colours or exif:
            kept.append(segment)
    return b"".join([*kept, data[at:]])


def _bare_tiff(data: bytes, keep_exif: bool) -> bytes:
    """Returns the file with only the needed tags in its first directory, which stays where it is."""
    byteorder = "little" if data[:2] == b"II" else "big"
    at = int.from_bytes(data[4:8], byteorder)
    count = int.from_bytes(data[at : at + 2], byteorder)
    needed = _TIFF_PIXELS | ({_TIFF_ORIENTATION} if keep_exif else set())
    end = at + 2 + 12 * count
    entries = [data[start : start + 12] for start in range(at + 2, end, 12)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], byteorder) in needed]
    directory = len(kept).to_bytes(2, byteorder) + b"".join(kept)
    # The end of a directory is the address of the next one: 0, for none.
    return data[:at] + directory.ljust(end + 4 - at, b"\0") + data[end + 4 :]
