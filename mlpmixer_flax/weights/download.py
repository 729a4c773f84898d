"""Downloads files into a local cache: continues after an interruption, checks sizes and hashes."""

import base64
import functools
import hashlib
import os
import re
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from filelock import AcquireReturnProxy, FileLock, Timeout
from tqdm import tqdm

from mlpmixer_flax import UserError, __version__
from mlpmixer_flax.remote import cache_dir

TIMEOUT_SECONDS = 30
PAUSES_SECONDS = (1, 2, 4)  # before each new try after the connection dropped
BLOCK_BYTES = 2**18
MIB = 2**20
# disable=None shows the bar on terminals only.
_bar = functools.partial(tqdm, unit="B", unit_scale=True, unit_divisor=1024, disable=None)


class DownloadError(UserError):
    """A file cannot be downloaded, or came with other content than expected; `cache` is where it would be."""

    def __init__(self, message: str, cache: str = ""):
        super().__init__(message)
        self.cache = cache or f"{cache_dir()} (MLPMIXER_CACHE chooses another directory)"


class _Version(NamedTuple):
    """What the server says about the file that it sends."""

    size_bytes: int | None
    md5: str | None  # in hex
    validator: str | None  # ETag or date; changes whenever the file changes


class _Dropped(Exception):
    """The connection broke before the end; the message says how."""


def cache_file(url: str) -> Path:
    """Returns where `fetch` puts the file of a URL, which may not exist yet; never uses the network.

    Raises:
      UserError: `fetch` does not accept the URL.
    """
    address, _, pin = url.partition("#")
    if not re.fullmatch("(?i)https?://[!-~]+", address):
        raise UserError(
            f"{url!r} is not an http or https URL in plain ASCII: give one, or the path of a file you have"
        )
    if pin and not re.fullmatch("sha256=[0-9a-f]{64}", pin.lower()):
        raise UserError(f"cannot use the end of {url!r}: give a hash as #sha256= and 64 hex digits")
    # The hash is part of the key, so a file found under this key has passed the check of its hash.
    key = hashlib.sha256(f"{address}#{pin.lower()}".encode()).hexdigest()[:16]
    base_name = unquote(address.partition("?")[0].rpartition("/")[2])
    # Long names lose their start, because the end says what kind of file it is.
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", base_name)[-100:].lstrip(".") or "download"
    return cache_dir() / key / name


def fetch(url: str, *, size_mib: float | None = None) -> Path:
    """Returns the local file of a URL; downloads it if it isn't in the cache yet.

    An interrupted download continues where it stopped, if the server supports that. The file gets its name
    only after it is complete and has the size and hash (x-goog-hash) that the server announced. If several
    processes want the same file, one downloads it and the others wait.

    Args:
      url: http or https; may end in `#sha256=HEX`, the hash that the file must have.
      size_mib: published size, to two decimals, that the file must have.

    Raises:
      DownloadError: no such file, no connection, or a file of another size or hash, which isn't kept.
      UserError: the URL is not one, or there is no space.
    """
    file = cache_file(url)
    if os.path.isfile(file):  # unlike Path.is_file, no error if the directory may not be read
        return file
    address, _, pin = url.partition("#")
    sha256 = pin.lower().removeprefix("sha256=")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):
            if not file.is_file():  # no other process finished it while this one waited
                version = _download(address, file, size_mib=size_mib)
                part = _part(file, version)
                _check(address, part, size_mib=size_mib, sha256=sha256, md5=version.md5)
                os.replace(part, file)
    except OSError as error:  # of the disk; errors of the network are caught where they occur
        raise UserError(
            f"cannot write to {file.parent} ({error.strerror or error}): "
            "make room there, or set MLPMIXER_CACHE to another directory"
        ) from None
    return file


def _lock(file: Path) -> AcquireReturnProxy:
    """Waits until no other process downloads the file; the operating system unlocks for one that dies."""
    lock = FileLock(f"{file}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {file}", file=sys.stderr)
        return lock.acquire()


def _download(url: str, file: Path, *, size_mib: float | None) -> _Version:
    """Completes the partial file, over several connections if they drop; returns its version."""
    reason = ""
    for tries, pause_seconds in enumerate((0, *PAUSES_SECONDS)):
        time.sleep(pause_seconds)
        try:
            return _receive(url, file, size_mib=size_mib, first=tries == 0)
        except _Dropped as dropped:
            reason = str(dropped)
    raise DownloadError(f"the download of {url} broke off ({reason}): run the command again to continue it")


def _receive(url: str, file: Path, *, size_mib: float | None, first: bool) -> _Version:
    """Completes the partial file over one connection."""
    old = next(file.parent.glob(f"{file.name}.*.part"), None)
    # The last byte is requested again, because a complete part has no other byte left to request.
    start = max(old.stat().st_size - 1, 0) if old else 0
    response = _open(url, start, first=first)
    if response.status == 206 and _part(file, _version(response)) != old:  # the file has changed
        response.close()
        response = _open(url, 0, first=first)
    with response:
        version = _version(response)
        part, done_bytes = _part(file, version), start if response.status == 206 else 0
        _check_size(url, version.size_bytes, size_mib)
        for other in set(file.parent.glob("*.part")) - {part}:
            other.unlink()
        if first and not sys.stderr.isatty():
            size = f"{version.size_bytes / MIB:.2f} MiB" if version.size_bytes else "size unknown"
            print(f"downloading {url} ({size}) to {file}", file=sys.stderr)
        with (
            part.open("r+b" if done_bytes else "wb") as out,
            _bar(total=version.size_bytes, initial=done_bytes, desc=file.name) as bar,
        ):
            out.seek(done_bytes)
            while block := _read(response):
                done_bytes += out.write(block)
                bar.update(len(block))
    if version.size_bytes is not None and version.size_bytes != done_bytes:
        raise _Dropped(f"{done_bytes:,} of {version.size_bytes:,} bytes came")
    return version


def _open(url: str, start: int, *, first: bool) -> HTTPResponse:
    """Opens a file from byte `start` (status 206), or the whole file (200) if the server can't do that."""
    headers = {"User-Agent": f"mlpmixer-flax/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    reason = ""
    try:
        request = urllib.request.Request(url, headers=headers)
        # urlopen would use for ever the proxies that the environment named at its first call.
        response = urllib.request.build_opener().open(request, timeout=TIMEOUT_SECONDS)
        rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status == 200 or (start and response.status == 206 and rest):
            return response
    except urllib.error.HTTPError as error:
        response = error
    except (OSError, HTTPException, ValueError) as error:
        response, reason = None, _reason(error)
    if response is not None:
        response.close()
        if start and response.status in (206, 416):  # other bytes, or none: the file is shorter now
            return _open(url, 0, first=first)
        reason = f"HTTP {response.status} {responses.get(response.status or 0, '')}".strip()
    if not first:  # the server answered before, so it may do so again
        raise _Dropped(reason)
    raise DownloadError(f"{url} cannot be downloaded ({reason}): check the address and the network")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise _Dropped(_reason(error)) from None


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__


def _version(response: HTTPResponse) -> _Version:
    total = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    hashes = ",".join(response.headers.get_all("x-goog-hash", []))  # Google Cloud Storage's, in base64
    md5 = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", hashes)
    etag = response.headers.get("ETag", "")
    return _Version(
        size_bytes=int(total[1]) if total else response.length,
        md5=base64.b64decode(md5[1]).hex() if md5 else None,
        # A weak ETag can stay the same although bytes change (RFC 9110, 8.8.1).
        validator=etag if etag.startswith('"') else response.headers.get("Last-Modified"),
    )


def _part(file: Path, version: _Version) -> Path:
    """Returns the partial file of a version: bytes of different versions never go into the same file."""
    key = hashlib.sha256(repr(version).encode()).hexdigest()[:16]
    return file.with_name(f"{file.name}.{key}.part" if version.validator else f"{file.name}.part")


def _check(url: str, part: Path, *, size_mib: float | None, sha256: str, md5: str | None) -> None:
    """Makes sure that the complete file is on the disk; removes it if its size or a hash is wrong."""
    try:
        _check_size(url, part.stat().st_size, size_mib)
        with part.open("rb") as file:
            for algorithm, expected in (("sha256", sha256), ("md5", md5)):
                file.seek(0)
                start = functools.partial(hashlib.new, algorithm, usedforsecurity=False)
                found = expected and hashlib.file_digest(file, start).hexdigest()
                if found != expected:
                    raise DownloadError(
                        f"{url} came with {algorithm} {found} instead of {expected} and was removed: "
                        "run the command again; if that repeats, get the file elsewhere"
                    )
            os.fsync(file.fileno())
    except UserError:
        part.unlink()
        raise


def _check_size(url: str, size_bytes: int | None, size_mib: float | None) -> None:
    if size_bytes is None or size_mib is None:
        return
    if abs(size_bytes - size_mib * MIB) > 0.01 * MIB:  # one unit of the last published decimal
        raise DownloadError(
            f"{url} is {size_bytes:,} bytes, not the {size_mib} MiB expected, and was not kept: "
            "check the address, or get the file elsewhere"
        )
