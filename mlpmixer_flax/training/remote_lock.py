"""Keeps a second run out of a remote directory, where files cannot be locked.

The lock is an object, `in_use.json`. A run creates it in one request that fails if it exists, and writes it again every
few seconds. One that nobody writes any more belongs to a run that was killed, so the next run takes its place. A run
that finds its lock taken, because it could not reach the directory for a while, uploads nothing more and stops.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.remote import connect, explaining
from mlpmixer_flax.training.lock import name_of

LOCK = "in_use.json"
RENEW_SECONDS = 10.0  # how often the lock is written
_PATIENCE = 4  # after so many times this long without a write, its run counts as killed


class RemoteLock:
    """The lock of a remote directory; `copy` names the copy of the directory on this machine."""

    def __init__(self, url: str, *, copy: str):
        self.url, self.copy = url, copy
        with explaining(url):
            self._fs, root = connect(url)
        self._path = f"{root}/{LOCK}"
        self._token = secrets.token_hex(8)  # of this process
        self._lost = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock during the block. Only one process of a machine may use the copy meanwhile.

        Raises:
          UserError: another process holds it, or the directory cannot be written.
        """
        with explaining(self.url):
            self._take()
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # a lock that stays becomes invalid by itself
                if not self.is_lost():
                    self._fs.rm_file(self._path)

    def _take(self) -> None:
        if self._create():
            return
        owner = self._owner()
        # A process that has used the copy of this machine has ended, because this one uses it now.
        if owner.get("copy") != self.copy:
            self._wait_for_the_end_of(owner)
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path)
        if not self._create():  # another process was faster
            raise self._in_use(self._owner())

    def _wait_for_the_end_of(self, owner: dict[str, Any]) -> None:
        seconds = _PATIENCE * RENEW_SECONDS
        print(
            f"{self.url} was in use by {name_of(owner)}: waiting {seconds:.0f} s to see if it still is",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + seconds
        while (now := self._owner()) == owner and time.monotonic() < end:
            time.sleep(RENEW_SECONDS / 4)
        if now and now != owner:
            raise self._in_use(now)

    def _in_use(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"{self.url} is in use by {name_of(owner)}: wait until it ends, or choose another --workdir"
        )

    def _create(self) -> bool:
        """Writes the lock if it does not exist; returns whether it did not."""
        try:
            self._fs.pipe_file(self._path, self._content(), mode="create")
        except FileExistsError:
            return False
        return True

    def _content(self) -> bytes:
        owner = {"process": os.getpid(), "host": socket.gethostname(), "token": self._token}
        return json.dumps({**owner, "copy": self.copy, "written_at": time.time()}).encode()

    def _owner(self) -> dict[str, Any]:
        """Returns what the lock says; {} if nobody holds it."""
        return read_there(self._fs, self._path)

    def renew(self) -> None:
        """Writes the lock again. If another process has taken it, stops this run, as SIGTERM does."""
        if not self.is_lost():
            self._fs.pipe_file(self._path, self._content())
        elif not self._lost:
            self._lost = True
            os.kill(os.getpid(), signal.SIGTERM)

    def is_lost(self) -> bool:
        """Returns whether another process has taken the lock."""
        return self._lost or self._owner().get("token") != self._token


def read_there(fs: Any, path: str) -> dict[str, Any]:
    """Returns the object in a remote JSON file; {} if the file does not exist or is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        if isinstance(content := json.loads(fs.cat_file(path)), dict):
            return content
    return {}
