"""Writes files atomically: a reader sees the old file or the complete new one, also after a crash."""

import contextlib
import glob
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import pass_on

_ABANDONED_SECONDS = 86_400  # after so long without a write, a temporary file belongs to no process


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, if they do not exist.

    Raises:
      UserError: it cannot be created there.
      OSError: the disk is full or at fault; the error names the folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        pass_on(error, path)
        raise UserError(f"cannot write to {path} ({error.strerror}): choose another place") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, which replaces `path` at the end of the `with` block.

    The content is on disk before it replaces anything. If the block raises an error, the temporary file is
    removed, and `path` stays as it was.

    Raises:
      UserError: the file cannot be written there.
      OSError: the disk is full or at fault; the error names the file.
    """
    # Random, because processes of two machines, or of two containers, may have the same number.
    temporary = Path(f"{path}.{secrets.token_hex(4)}.tmp")
    _remove_abandoned(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        pass_on(error, path if error.filename in (None, str(temporary)) else None)
        raise UserError(f"cannot write {path} ({error.strerror}): choose another place") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files of `path` that killed processes have left, if they are a day old."""
    with contextlib.suppress(OSError):
        for file in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
            if time.time() - file.lstat().st_mtime > _ABANDONED_SECONDS:
                file.unlink()


def write_json(file: BinaryIO, content: Any) -> None:
    """Writes a JSON text for people and programs; bytes of a file name that are not text become escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write(text.encode(errors="backslashreplace"))
