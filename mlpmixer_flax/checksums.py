"""Checksums of the files of a checkpoint, so that a changed bit is found before its weights are used."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.reading import open_file, read_json

# A file in the folder of a checkpoint: name of a file -> its hash in hexadecimal digits. XXH3 takes a fifth of the time of
# SHA-256, and finds changed bits as surely. Neither helps against somebody who changes the hashes too.
_FILE, _hash = "xxh3_128.json", xxhash.xxh3_128
_EARLIER = {"sha256.json": hashlib.sha256}  # in checkpoints of earlier versions


def write_checksums(checkpoint: Path) -> None:
    """Writes the checksums of the files in the subfolders of a checkpoint into a file in it.

    Orbax still changes the files that are not in a subfolder when it commits the checkpoint.

    Raises:
      OSError: a file cannot be read or written.
    """
    names = sorted(name for name in _names(checkpoint) if "/" in name)
    with ThreadPoolExecutor() as pool, replacing(checkpoint / _FILE) as file:
        digests = pool.map(lambda name: _digest(checkpoint / name, _hash), names)
        file.write(json.dumps(dict(zip(names, digests, strict=True)), indent=0).encode())


def add_checksum(checkpoint: Path, name: str, content: bytes) -> None:
    """Adds the checksum of a file that is about to be written into a saved checkpoint.

    Raises:
      ValueError: the checksums cannot be read.
      OSError: a file cannot be read or written.
    """
    if not (checkpoint / _FILE).exists():  # an earlier version saved it
        write_checksums(checkpoint)
    digests = read_json(checkpoint / _FILE) | {name: _hash(content).hexdigest()}
    with replacing(checkpoint / _FILE) as file:
        file.write(json.dumps(digests, indent=0).encode())


def check_files(checkpoint: Path, part: str) -> bool:
    """Checks that the files in one subfolder of a checkpoint are as they were saved.

    Args:
      checkpoint: the folder of a saved step.
      part: name of the subfolder: "weights", "metrics" or "default", which has the rest of the state.

    Returns:
      False if the checkpoint has no checksums, because an earlier version of the package wrote it.

    Raises:
      ValueError: a file is missing or is not as it was saved, or the checksums cannot be read.
      OSError: a file cannot be read.
    """
    kinds = {_FILE: _hash, **_EARLIER}
    file = next((name for name in kinds if (checkpoint / name).exists()), None)
    if file is None:
        return False
    saved = read_json(checkpoint / file)
    if not isinstance(saved, dict):
        raise ValueError(f"its file {file} is damaged")
    digests = {name: digest for name, digest in saved.items() if name.startswith(f"{part}/")}
    if not digests:
        raise ValueError(f"its file {file} is damaged")
    existing = set(_names(checkpoint))
    with ThreadPoolExecutor() as pool:
        found = pool.map(
            lambda name: _digest(checkpoint / name, kinds[file]) if name in existing else "", digests
        )
        for (name, digest), now in zip(digests.items(), found, strict=True):
            if digest != now:
                raise ValueError(f"its file {name} is not as it was saved")
    return True


def without_checksums(step: int) -> str:
    """Returns a line about a checkpoint for which `check_files` returns False."""
    return f"checkpoint {step} has no checksums, as an earlier version saved it: flipped bits in it are not found"


def _names(folder: Path) -> Iterator[str]:
    """Yields the names of all files in a folder and its subfolders, relative to it."""
    for parent, _, files in os.walk(folder):
        for name in files:
            yield (Path(parent) / name).relative_to(folder).as_posix()


def _digest(file: Path, kind: Callable[[], Any]) -> str:
    """Returns the hash of a file."""
    with open_file(file) as opened:
        return hashlib.file_digest(opened, kind).hexdigest()
