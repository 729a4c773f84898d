"""Reads files: only regular ones, because a pipe or a device may never begin, or never end."""

import contextlib
import io
import json
import os
import stat
from typing import Any

from mlpmixer_flax import UserError

_DEEPEST = 100  # levels of nested lists and objects in a JSON file; ours have four
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file, or a link to one, for reading bytes.

    Raises:
      UserError: it is a pipe, a device or a socket.
      OSError: it does not exist, is a folder, or cannot be read.
    """
    _check_kind(path)
    return open(path, "rb")


def check_files_in(folder: str | os.PathLike[str]) -> None:
    """Checks that a folder has only folders and regular files, or links to them; for libraries that open them all.

    Raises:
      UserError: one of its files is a pipe, a device or a socket.
      OSError: a folder cannot be read.
    """
    waiting = [os.path.realpath(folder)]
    seen = {*waiting}  # links may lead back to a folder
    while waiting:
        path = waiting.pop()
        if os.path.isdir(path):
            inside = {os.path.realpath(os.path.join(path, name)) for name in os.listdir(path)} - seen
            seen |= inside
            waiting += inside
        else:
            with contextlib.suppress(FileNotFoundError):  # a link to nothing, or removed meanwhile
                _check_kind(path)


def _check_kind(path: str | os.PathLike[str]) -> None:
    if kind := _KINDS.get(stat.S_IFMT(os.stat(path).st_mode)):
        raise UserError(f"{os.fspath(path)!r} is {kind}: give a regular file")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Returns the content of a JSON file.

    Raises:
      UserError, OSError: as `open_file`.
      ValueError: it is not UTF-8 or not JSON, or is nested too deep.
    """
    with open_file(path) as file:
        try:
            content = json.loads(file.read().decode("utf-8"))
        except RecursionError:
            raise ValueError("it is nested too deep") from None
    level = [content]
    for _ in range(_DEEPEST):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [each for item in nested for each in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise ValueError("it is nested too deep")
    return content


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the object in a JSON file that is not needed; {} if the file cannot be read or has something else."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(content := read_json(path), dict):
            return content
    return {}
