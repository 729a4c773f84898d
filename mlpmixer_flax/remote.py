"""Remote paths, such as s3://bucket/photos: finds, copies and uploads them, with fsspec.

All other code reads and writes files of this machine. A remote path has a fixed place on this machine for its copy, in
the cache: `remote/s3/bucket/photos`. Code that reads a path calls `fetch` first, and code that has written one calls
`publish`; both do nothing for other paths.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import in_one_line, pass_on

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # also s3:/bucket: pathlib turns // into /
_NOT_REMOTE = {"file", "local", "data", "http", "https", "ftp"}  # fsspec knows them too
_COPIES, WORKING_COPIES = "remote", "runs"  # folders of the cache; training writes to the second
_CHUNK = 128  # files that are copied at a time
_MIB = 2**20


class NothingThere(UserError):
    """There is no file and no folder at a remote path."""


# --- paths


def cache_dir() -> Path:
    """Returns the directory of the cache, which may not exist yet.

    $MLPMIXER_CACHE, else $XDG_CACHE_HOME/mlpmixer-flax, else ~/.cache/mlpmixer-flax.

    Raises:
      UserError: there is no such home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("MLPMIXER_CACHE") or f"{base}/mlpmixer-flax")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise UserError(f"no home directory found for {folder}: set MLPMIXER_CACHE to a directory") from None


def copy_of(path: str | os.PathLike[str], *, folder: str = _COPIES) -> Path | None:
    """Returns the place on this machine for the copy of a remote path; None if the path is not remote.

    A file or folder of this machine with such a name is not remote. Nothing is read from the network.

    Raises:
      UserError: the path is remote and cannot be used, because it has no name or has "..".
    """
    text = os.fspath(path)
    found = _URL.fullmatch(text)
    if not found or os.path.lexists(text) or not _is_known(found[1].lower()):
        return None
    names = [name for name in found[2].split("/") if name]
    if not names or {".", ".."} & {*names}:
        raise UserError(f"{text!r} cannot be used: give an address such as s3://bucket/folder")
    return cache_dir().absolute() / folder / found[1].lower() / "/".join(names)


def _is_known(scheme: str) -> bool:
    from fsspec.registry import known_implementations  # here, because it takes time

    return scheme in known_implementations and scheme not in _NOT_REMOTE


def url_of(path: Path, *, folder: str = _COPIES) -> str | None:
    """Returns the remote path of which a path is the copy, such as "s3://bucket/run"; None if it is no copy."""
    with contextlib.suppress(ValueError, UserError):  # the second: there is no cache
        scheme, *names = path.relative_to(cache_dir().absolute() / folder).parts
        return f"{scheme}://{'/'.join(names)}"
    return None


def shown(path: Path) -> str:
    """Returns the name of a path for the user: of a copy, its remote path."""
    return url_of(path) or url_of(path, folder=WORKING_COPIES) or str(path)


# --- copying


def fetch(copy: Path, choose: Callable[[Collection[str]], Collection[str]] = lambda names: names) -> Path:
    """Brings the copy of a remote file or folder up to date, and returns its path; does nothing for other paths.

    A file is copied again if its size or its time of change differs. It has its name only after it is complete.
    If several processes copy from the same bucket, one does so and the others wait.

    Args:
      copy: from `copy_of`, or below it.
      choose: returns which files of the folder to copy, given the names of all of them, relative to the folder.

    Raises:
      NothingThere: no such file or folder exists.
      UserError: it cannot be read, or a package is missing.
    """
    url = url_of(copy)
    if url is None:
        return copy
    bucket = cache_dir().absolute().joinpath(*copy.relative_to(cache_dir().absolute()).parts[:3])
    with explaining(url):
        bucket.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{bucket}.lock"):
            download(url, copy, choose)
    return copy


def download(url: str, copy: Path, choose: Callable[[Collection[str]], Collection[str]]) -> None:
    """Makes a local file or folder equal to what is chosen of a remote one, as `fetch` says."""
    fs, root = connect(url)
    found = list_files(fs, root)
    if not found:
        raise NothingThere(f"nothing is at {url}: correct the address")
    chosen = {name: found[name] for name in sorted(choose(found))}
    if "" not in found:  # it is a folder
        _remove(copy, {*choose(local_files(copy))} - found.keys())
    changed = [name for name, info in chosen.items() if not _is_same(copy / name, info)]
    if not changed:
        return
    size = sum(found[name]["size"] for name in changed)
    print(f"copying {url} ({len(changed):,} files, {size / _MIB:.1f} MiB) to {copy}", file=sys.stderr)
    with tqdm(total=size, unit="B", unit_scale=True, leave=False, delay=2, disable=None) as bar:
        for start in range(0, len(changed), _CHUNK):
            names = changed[start : start + _CHUNK]
            parts = [f"{copy / name}.part" for name in names]
            fs.get([f"{root}/{name}".rstrip("/") for name in names], parts)
            for name, part in zip(names, parts, strict=True):
                _keep(Path(part), copy / name, found[name], url=url)
                bar.update(found[name]["size"])


def _remove(folder: Path, names: Collection[str]) -> None:
    """Removes files of a folder, and the folders in it that become empty."""
    for name in names:
        (folder / name).unlink()
        with contextlib.suppress(OSError):
            for parent in (folder / name).parents:
                if parent == folder:
                    break
                parent.rmdir()


def _keep(part: Path, file: Path, info: Mapping[str, Any], *, url: str) -> None:
    """Gives a complete file its name and the time of the remote one."""
    size = part.stat().st_size
    if size != info["size"]:
        part.unlink()
        raise UserError(
            f"{file.name} of {url} came with {size:,} of {info['size']:,} bytes: run the command again"
        )
    os.utime(part, times=(_changed_at(info), _changed_at(info)))
    if file.is_dir():  # a name may have been that of a folder
        shutil.rmtree(file)
    part.replace(file)


def _is_same(file: Path, info: Mapping[str, Any]) -> bool:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return status.st_size == info["size"] and status.st_mtime_ns == _changed_at(info) * 10**9


def _changed_at(info: Mapping[str, Any]) -> int:
    """Returns when a remote file was changed, in seconds; each file system of fsspec says it in its own way."""
    for key in ("LastModified", "mtime", "last_modified", "created"):
        if isinstance(changed := info.get(key), datetime):
            return int(changed.timestamp())
        if isinstance(changed, (int, float)):
            return int(changed)
    return 0


def publish(*paths: Path) -> None:
    """Uploads files and folders that were written at the place of a copy; does nothing for other paths.

    Raises:
      UserError: they cannot be uploaded; the message says where they are.
    """
    for path in paths:
        if url := url_of(path):
            with explaining(url, f"; its files are in {path}"):
                fs, root = connect(url)
                names = local_files(path)
                fs.put([str(path / name) for name in names], [f"{root}/{name}".rstrip("/") for name in names])


# --- files


def connect(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a remote path, and the path in it."""
    import fsspec

    fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    fs.invalidate_cache()
    return fs, root.rstrip("/")


def list_files(fs: Any, root: str) -> dict[str, Mapping[str, Any]]:
    """Returns name -> what fsspec says about each file below a path; the name of the path itself is ""."""
    found = fs.find(root, detail=True)
    names = {path: path.removeprefix(root).removeprefix("/") for path in found}
    # A name that ends with "/" stands for a folder. Object stores allow names that are no names of files.
    return {
        names[path]: info
        for path, info in found.items()
        if not path.endswith("/") and not {"", ".", ".."} & {*f"_{names[path]}".split("/")}
    }


def local_files(path: Path) -> list[str]:
    """Returns the names of the files in a folder and its subfolders, relative to it; [""] for a file."""
    if path.is_file():
        return [""]
    names = (
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, files in os.walk(path)
        for file in files
    )
    return sorted(names)


@contextlib.contextmanager
def explaining(url: str, end: str = "") -> Iterator[None]:
    """Raises what goes wrong with a remote path in the block as a UserError; a full disk stays an OSError.

    Args:
      end: of the message.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f'{url} needs another package ({in_one_line(error)}): for s3 and gs, run pip install "mlpmixer-flax[remote]"'
        ) from error
    except Exception as error:  # each file system has its own classes
        if isinstance(error, OSError) and error.filename is not None:  # of this machine
            pass_on(error)
            raise
        raise UserError(
            f"{url} cannot be reached ({in_one_line(error)}): check the address, your credentials and the network{end}"
        ) from error
