"""Keeps a second process out of a run directory while a run is in training."""

import contextlib
import errno
import json
import os
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.reading import read_object
from mlpmixer_flax.remote import shown
from mlpmixer_flax.text import shorten
from mlpmixer_flax.training.processes import is_lead

LOCK_FILE = "in_use.lock"
# Who holds the lock: not in the locked file, which some versions of filelock empty
OWNER_FILE = "in_use.json"


def name_of(owner: Mapping[str, Any]) -> str:
    """Returns how messages call the process that holds a lock; the file that tells it may be damaged."""
    told = [owner.get(key) for key in ("process", "host")]
    if not all(isinstance(value, (int, str)) for value in told):
        return "another process"
    process, host = (shorten(str(value), 60) for value in told)
    return f"process {process} on {host}"


def try_lock(file: Path, *, otherwise: str) -> FileLock | None:
    """Takes the lock of a file and returns it; None if another process holds it.

    Args:
      otherwise: what to do if the file cannot be locked, the end of the message.

    Raises:
      UserError: the file cannot be locked, for example because its file system has no locks.
    """
    lock = FileLock(file)
    try:
        with warnings.catch_warnings():
            # Some versions would use a marker file, which stays after a kill, and which 3.29 does not respect.
            warnings.filterwarnings("error", "flock not supported", UserWarning)
            lock.acquire(timeout=0)
    except Timeout:
        return None
    except (OSError, UserWarning, NotImplementedError) as error:  # earlier versions raise the third
        pass_on(error, file)
        reason = getattr(error, "strerror", None) or os.strerror(errno.ENOSYS)
        raise UserError(f"cannot lock {file} ({reason}): {otherwise}") from None
    return lock


class RunLock:
    """The lock of a run directory; programs that only read a run do not need it.

    The system releases it when the process ends, however it ends, so files that a killed run leaves behind block
    nothing.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._lock: FileLock | None = None

    def check(self) -> None:
        """Takes the lock if the directory has the file for it; otherwise no process uses it, and nothing is written.

        Raises:
          UserError: another process uses the directory.
        """
        if (self._workdir / LOCK_FILE).exists():
            self.take()

    def take(self) -> None:
        """Creates the directory and takes the lock, if this process does not hold it already.

        Raises:
          UserError: another process uses the directory, or it cannot be written to.
        """
        # In a run on several hosts, which share the directory, the first process takes the lock for all.
        if self._lock or not is_lead():
            return
        make_folder(self._workdir)
        lock = try_lock(self._workdir / LOCK_FILE, otherwise="choose another --workdir")
        if lock is None:
            owner = name_of(read_object(self._workdir / OWNER_FILE))
            raise UserError(
                f"{shown(self._workdir)} is in use by {owner}: wait until it ends, or choose another --workdir"
            )
        self._lock = lock
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        with replacing(self._workdir / OWNER_FILE) as file:
            file.write(json.dumps(owner).encode())

    def close(self) -> None:
        """Releases the lock."""
        if self._lock:
            with contextlib.suppress(OSError):
                (self._workdir / OWNER_FILE).unlink()
            self._lock.release()
            self._lock = None
