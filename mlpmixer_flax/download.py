"""Files from the web in a local cache: resumed after an interruption, checked, there whole or not at all."""

import base64
import functools
import hashlib
import json
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

TIMEOUT_SECONDS = 30
PAUSES_SECONDS = (1, 2, 4)  # before each new try after the connection dropped
BLOCK_BYTES = 2**18
MIB = 2**20


class Promise(NamedTuple):
    """What the server said of the file when it began to send it; kept beside the part that has come."""

    size_bytes: int | None
    md5: str | None  # in base64, as Google Cloud Storage sends it
    validator: str | None  # ETag or date by which the server knows this version again


class _Dropped(Exception):
    """The connection broke before the end; the message says how."""


def cache_dir() -> Path:
    """$MLPMIXER_CACHE, else $XDG_CACHE_HOME/mlpmixer-flax, else ~/.cache/mlpmixer-flax; perhaps not there yet.

    Raises UserError where there is no home directory to find it in.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("MLPMIXER_CACHE") or f"{base}/mlpmixer-flax")
    try:
        return folder.expanduser()
    except RuntimeError:
        raise UserError(f"{folder} leads to no home directory: set MLPMIXER_CACHE to a directory") from None


def cached(url: str) -> Path | None:
    """Where the finished download of a URL lies, None if there is none. Never touches the network.

    Raises UserError where it is no URL that `fetch` takes.
    """
    _, _, file = _locate(url)
    # Unlike Path.is_file, no error where the directory may not be read.
    return file if os.path.isfile(file) else None


def fetch(url: str, *, size_mib: float | None = None) -> Path:
    """The local file of a URL, downloaded if it isn't in the cache yet.

    An interrupted download continues where it stopped, if the server can. The file gets its name only once it
    is complete and has the size and the hash (x-goog-hash) that the server announced. Of several processes
    one downloads, the others wait for it.

    Args:
      url: http or https; may end in `#sha256=HEX`, the hash that the file must have.
      size_mib: published size, to two decimals, that the file must have.

    Raises:
      UserError: no such URL, no connection, no room, or a file of another size or hash, which isn't kept.
    """
    address, sha256, file = _locate(url)
    if os.path.isfile(file):
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):
            if not file.is_file():  # nobody finished it while this process waited
                part = file.with_name(f"{file.name}.part")
                promise = _download(address, part, size_mib=size_mib)
                _check(address, part, size_mib=size_mib, sha256=sha256, md5=promise.md5)
                os.replace(part, file)
                _discard(part)
    except OSError as error:  # of the disk: those of the network are caught where they arise
        raise UserError(
            f"cannot write to {file.parent} ({error.strerror or error}): "
            "make room there, or set MLPMIXER_CACHE to another directory"
        ) from None
    return file


def _locate(url: str) -> tuple[str, str | None, Path]:
    """What to ask the server for, the SHA-256 that the URL pins, and where the file goes."""
    address, _, fragment = url.partition("#")
    if not re.fullmatch("(?i)https?://[!-~]+", address):
        raise UserError(
            f"{url!r} is not an http or https URL in plain ASCII: give one, or the path of a file you have"
        )
    pin = re.fullmatch("sha256=([0-9a-f]{64})", fragment.lower())
    if fragment and not pin:
        raise UserError(f"cannot use the end of {url!r}: a hash is pinned by #sha256= and 64 hex digits")
    # The pin is part of the key: what lies under it has passed its check.
    key = hashlib.sha256(f"{address}#{fragment.lower()}".encode()).hexdigest()[:16]
    base_name = unquote(address.partition("?")[0].rpartition("/")[2])
    # The end of a long name says what kind of file it is.
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", base_name)[-100:].lstrip(".") or "download"
    return address, pin and pin[1], cache_dir() / key / name


def _lock(file: Path) -> AcquireReturnProxy:
    """Held by the one process that may download; the system lets go of it when that process dies."""
    lock = FileLock(f"{file}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that downloads {file}", file=sys.stderr)
        return lock.acquire()


def _download(url: str, part: Path, *, size_mib: float | None) -> Promise:
    for tries, pause_seconds in enumerate((0, *PAUSES_SECONDS)):
        time.sleep(pause_seconds)
        try:
            return _receive(url, part, size_mib=size_mib, first=tries == 0)
        except _Dropped as dropped:
            reason = str(dropped)
    raise UserError(f"the download of {url} broke off ({reason}): run the command again to continue it")


def _receive(url: str, part: Path, *, size_mib: float | None, first: bool) -> Promise:
    """Completes the partial file over one connection."""
    promise, done_bytes = _interrupted(part)
    if promise and done_bytes == promise.size_bytes:  # killed before it was checked
        return promise
    headers = {"User-Agent": f"mlpmixer-flax/{__version__}"}
    if promise:
        headers |= {"Range": f"bytes={done_bytes}-", "If-Range": promise.validator}
    with _open(url, headers, first=first) as response:
        if response.status == 200:
            promise, done_bytes = _promise(response), 0
        elif not _continues(response, promise, done_bytes):
            _discard(part)
            return _receive(url, part, size_mib=size_mib, first=first)
        if promise.size_bytes is not None:
            _check_size(url, promise.size_bytes, size_mib)
        bar = tqdm(
            desc=part.stem,
            initial=done_bytes,
            total=promise.size_bytes,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None,  # shown on terminals only
        )
        if first and bar.disable:
            size = f"{promise.size_bytes / MIB:.2f} MiB" if promise.size_bytes else "size unknown"
            print(f"downloading {url} ({size}) to {part.with_suffix('')}", file=sys.stderr)
        with bar, part.open("ab" if done_bytes else "wb") as file:
            if not done_bytes:  # after the old part is cut to nothing, before the new one grows
                part.with_suffix(".promise").write_text(json.dumps(promise._asdict()))
            while block := _read(response):
                file.write(block)
                done_bytes += len(block)
                bar.update(len(block))
    if promise.size_bytes is not None and done_bytes != promise.size_bytes:
        raise _Dropped(f"{done_bytes:,} of {promise.size_bytes:,} bytes came")
    return promise


def _interrupted(part: Path) -> tuple[Promise | None, int]:
    """The promise and the bytes so far of a download that can continue, (None, 0) where none can."""
    try:
        promise = Promise(**json.loads(part.with_suffix(".promise").read_text()))
        done_bytes = part.stat().st_size
    except (OSError, ValueError, TypeError):  # not there, or damaged in a crash
        return None, 0
    can_continue = promise.validator and 0 < done_bytes <= (promise.size_bytes or 0)
    return (promise, done_bytes) if can_continue else (None, 0)


def _open(url: str, headers: dict[str, str], *, first: bool) -> HTTPResponse | urllib.error.HTTPError:
    """A response of status 200, or to a Range 206 or 416. On the first try every failure is final."""
    answers = (200, 206, 416) if "Range" in headers else (200,)
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        response = error
    except (OSError, HTTPException, ValueError) as error:
        raise _failure(url, _reason(error), final=first) from None
    if response.status not in answers:
        response.close()
        reason = f"HTTP {response.status} {responses.get(response.status, '')}".strip()
        raise _failure(url, reason, final=first or response.status not in range(500, 600))
    return response


def _failure(url: str, reason: str, *, final: bool) -> Exception:
    if not final:
        return _Dropped(reason)
    return UserError(
        f"{url} cannot be downloaded ({reason}): check the address and the network, "
        "or bring the file here yourself and pass its path"
    )


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None) or error
    return " ".join(str(cause).split()) or type(cause).__name__


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise _Dropped(_reason(error)) from None


def _promise(response: HTTPResponse) -> Promise:
    hashes = ",".join(response.headers.get_all("x-goog-hash", []))
    md5 = re.search(r"(?:^|[,\s])md5=([^,\s]+)", hashes)
    return Promise(response.length, md5 and md5[1], _validator(response))


def _validator(response: HTTPResponse) -> str | None:
    """The ETag, unless it is a weak one, which RFC 9110 (13.1.5) bars from If-Range; else the date."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _continues(response: HTTPResponse, promise: Promise, done_bytes: int) -> bool:
    """Whether it sends what comes after `done_bytes` of the version promised; some servers ignore If-Range."""
    span = response.headers.get("Content-Range", "")
    return (
        response.status == 206
        and span.startswith(f"bytes {done_bytes}-")
        and span.endswith(f"/{promise.size_bytes}")
        and _validator(response) in (None, promise.validator)
    )


def _check(url: str, part: Path, *, size_mib: float | None, sha256: str | None, md5: str | None) -> None:
    """Brings the complete file to the disk; one that fails a check is removed."""
    hashes = {"sha256": (sha256, bytes.hex), "md5": (md5, lambda digest: base64.b64encode(digest).decode())}
    try:
        with part.open("rb") as file:
            _check_size(url, os.fstat(file.fileno()).st_size, size_mib)
            for algorithm, (expected, encode) in hashes.items():
                if expected is None:
                    continue
                file.seek(0)
                start = functools.partial(hashlib.new, algorithm, usedforsecurity=False)
                found = encode(hashlib.file_digest(file, start).digest())
                if found != expected:
                    raise UserError(
                        f"{url} came with {algorithm} {found} instead of {expected} and was removed: "
                        "run the command again, and if that repeats, get the file elsewhere and pass its path"
                    )
            os.fsync(file.fileno())
    except UserError:
        _discard(part)
        raise


def _check_size(url: str, size_bytes: int, size_mib: float | None) -> None:
    if size_mib is not None and abs(size_bytes - size_mib * MIB) > 0.01 * MIB:  # a unit of the last decimal
        raise UserError(
            f"{url} is {size_bytes:,} bytes, not the {size_mib} MiB expected, and was not kept: "
            "check the address, or bring the file here yourself and pass its path"
        )


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".promise").unlink(missing_ok=True)
