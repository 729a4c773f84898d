"""Turns the paths that users give into local ones."""

import os
import re

from mlpmixer_flax import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # also gs:/bucket: pathlib turns // into /
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def local_path(path: str | os.PathLike[str], *, name: str) -> str:
    """Returns a path with "~" expanded.

    Args:
      name: what the path is, for the message: "folder" or "data_dir".

    Raises:
      UserError: the path is a URL, such as gs://bucket/photos.
    """
    path = os.fspath(path)
    if is_url(path) and not os.path.lexists(path):
        raise UserError(
            f"{name} {path!r} is a URL, and only local paths can be read: copy the data to this machine, or "
            "mount it, and give the path there"
        )
    return os.path.expanduser(path)


def is_url(path: str) -> bool:
    """Returns whether a path begins like a URL: gs://, s3://, https://."""
    return _URL.match(path) is not None


def is_archive(path: str) -> bool:
    """Returns whether the name of a file ends as the name of an archive does."""
    return path.lower().endswith(_ARCHIVES)
