"""Image files that Pillow cannot write, for tests: any depth, layout, tag and chunk of PNG and TIFF."""

import struct
import zlib

import numpy as np


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(rows, *, bits, color_type, width, before=b"", after=b"") -> bytes:
    """Returns a PNG file of rows of packed bytes, with chunks `before` and `after` the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_png(levels, *, before=b"") -> bytes:
    """Returns a PNG file with 16 bits per channel of levels (h, w, 1 to 4)."""
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[levels.shape[2]]
    rows = [row.astype(">u2").tobytes() for row in levels]
    return png(rows, bits=16, color_type=color_type, width=levels.shape[1], before=before)


def tiff(levels, *, order="<", deflate=False, planes=False, photometric=None, bits=None, tags=()) -> bytes:
    """Returns a TIFF file of levels (h, w, c), as their dtype; more tags are (number, struct letter, values)."""
    height, width, channels = levels.shape
    levels = levels.astype(levels.dtype.newbyteorder(order))
    strips = [levels[..., i] for i in range(channels)] if planes else [levels]
    strips = [zlib.compress(strip.tobytes()) if deflate else strip.tobytes() for strip in strips]
    starts = np.cumsum([8] + [len(strip) for strip in strips])
    entries = {
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [bits or levels.dtype.itemsize * 8] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [(1 if channels == 1 else 2) if photometric is None else photometric]),
        273: ("I", starts[:-1].tolist()),
        277: ("H", [channels]),
        278: ("H", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if planes else 1]),
        **{number: (letter, values) for number, letter, values in tags},
    }
    body, directory, extra_at = b"".join(strips), b"", int(starts[-1])
    for number, (letter, values) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(content) > 4:
            body, content = body + content, struct.pack(f"{order}I", extra_at)
            extra_at = 8 + len(body)
        kind = {"B": 1, "s": 2, "H": 3, "I": 4, "d": 12}[letter]
        directory += struct.pack(f"{order}HHI", number, kind, len(values)) + content.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)
