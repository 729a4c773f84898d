"""Trains in a remote run directory, such as s3://bucket/run: a copy on this machine, uploaded while the run goes on.

Object stores replace objects whole: they have no appending, no renaming of folders and no locks of files. So the run
writes files of this machine, as always, and this module uploads them:

- A checkpoint's file `MARKER` is uploaded after all others and deleted first, so a checkpoint with it is complete.
- A checkpoint that the run has deleted is deleted there only after the newer ones are complete there.
- `remote_lock` keeps other processes out.
- `mirror.json` has a mark, which the first upload of each process replaces. A run that was killed before it had uploaded
  everything goes on from its own copy, unless another machine has gone on with the run since: then the mark is another.
"""

import contextlib
import json
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.faults import in_one_line
from mlpmixer_flax.reading import read_object
from mlpmixer_flax.remote import (
    WORKING_COPIES,
    NothingThere,
    connect,
    copy_of,
    download,
    explaining,
    list_files,
    local_files,
    url_of,
)
from mlpmixer_flax.rundir import MARKER, files_of_run, saved_steps
from mlpmixer_flax.training import remote_lock
from mlpmixer_flax.training.lock import LOCK_FILE, OWNER_FILE, try_lock
from mlpmixer_flax.training.processes import is_lead
from mlpmixer_flax.training.remote_lock import LOCK, RemoteLock, read_there

UPLOAD_SECONDS = 30.0  # how often changed files are uploaded
_STATE, _LOCAL_LOCK = "mirror.json", "mirror.lock"
_OWN = {_STATE, _LOCAL_LOCK, LOCK, LOCK_FILE, OWNER_FILE}  # not files of the run


@contextlib.contextmanager
def mirrored(workdir: str | Path) -> Iterator[str | Path]:
    """Yields the directory to train in: of a remote run directory, a copy that is uploaded during and after the block.

    Of several processes, only the first one does so.

    Raises:
      UserError: another process uses the remote directory, or it cannot be read or written.
    """
    place = copy_of(workdir) or Path(workdir)
    url = url_of(place)
    if url is None or not is_lead():
        yield workdir
        return
    copy = copy_of(url, folder=WORKING_COPIES)
    assert copy
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(url, copy))
        mirror = _Mirror(url, copy)
        stack.enter_context(mirror.lock.held())
        stack.enter_context(
            _repeating(mirror.lock.renew, seconds=remote_lock.RENEW_SECONDS, failed=mirror.report)
        )
        with explaining(url):
            mirror.begin()
        stack.callback(mirror.end)
        stack.enter_context(_repeating(mirror.upload, seconds=UPLOAD_SECONDS, failed=mirror.report))
        yield copy


@contextlib.contextmanager
def _alone(url: str, copy: Path) -> Iterator[None]:
    """Keeps other processes of this machine out of the copy during the block; creates its folder."""
    make_folder(copy)
    lock = try_lock(copy / _LOCAL_LOCK, otherwise="set MLPMIXER_CACHE to a directory of another file system")
    if lock is None:
        raise UserError(
            f"{url} is in use by another process of this machine: wait until it ends, or choose another --workdir"
        )
    try:
        yield
    finally:
        lock.release()


class _Mirror:
    """A remote run directory and its copy on this machine."""

    def __init__(self, url: str, copy: Path):
        self.url, self.copy = url, copy
        with explaining(url):
            self._fs, self._root = connect(url)
        # "copy": the mark of what this process uploads; "seen": the mark that was found there last;
        # "sent": name of each file -> its size and time when it was uploaded
        mark = secrets.token_hex(8)
        self._state: dict[str, Any] = {"copy": mark, "seen": mark, "sent": {}}
        known = read_object(copy / _STATE)
        self._state |= {
            key: known[key] for key, value in self._state.items() if isinstance(known.get(key), type(value))
        }
        self.lock = RemoteLock(url, copy=self._state["copy"])
        self._reported = False

    def begin(self) -> None:
        """Makes the copy equal to the remote directory, unless nothing was uploaded since that the copy lacks."""
        names = list_files(self._fs, self._root).keys()
        whole = {*files_of_run(names)}
        # The others are of checkpoints whose upload was interrupted.
        self._delete([name for name in names - whole if name.startswith("checkpoints/")])
        mark = read_there(self._fs, self._path(_STATE)).get("copy", "")
        if mark not in (self._state["copy"], self._state["seen"]):
            if saved_steps(self.copy) and not ("config.json" in whole and any(map(_is_marker, whole))):
                print(
                    f"no checkpoint is at {self.url}: the run in {self.copy} continues and is uploaded; to begin anew, "
                    "choose another --workdir",
                    file=sys.stderr,
                    flush=True,
                )
                self._state["sent"] = {}
            else:
                self._copy_all()
        self.lock.copy = self._state["copy"] = secrets.token_hex(8)
        self.lock.renew()
        self._state["seen"] = mark
        self._keep_state({name: value for name, value in self._state["sent"].items() if name in whole})

    def _copy_all(self) -> None:
        for path in self.copy.iterdir():
            if path.name != _LOCAL_LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with contextlib.suppress(NothingThere):  # the run begins
            download(self.url, self.copy, lambda names: {*files_of_run(names)} - _OWN)
        self._state["sent"] = self._look()

    def upload(self) -> None:
        """Uploads what has changed since the last time, and deletes what the run has deleted."""
        if self.lock.is_lost():
            return
        sent, now = self._state["sent"], self._look()
        fresh = {name for name in now if sent.get(name) != now[name]}
        # Checkpoints that were saved again: scores may be added to one later, but its marker stays as it is.
        again = {_folder(name) for name in fresh if _is_marker(name)} & {*map(_folder, sent)}
        fresh |= {name for name in now if _folder(name) in again}
        # A checkpoint that the run deletes at this moment may have lost only some of its files.
        deleting = {_folder(name) for name in sent.keys() - now} - again - {""}
        gone = {name for name in sent if name not in now or _folder(name) in deleting}
        if not fresh and not gone:
            return
        replaced = {name for name in sent if _folder(name) in again}
        self._delete([*filter(_is_marker, replaced), *(replaced - now.keys())])
        self._keep_state(sent | dict.fromkeys(fresh))  # so that parts of a checkpoint are found again
        whose = {"copy": self._state["copy"], "host": socket.gethostname(), "folder": str(self.copy)}
        self._fs.pipe_file(self._path(_STATE), json.dumps(whose).encode())
        self._state["seen"] = self._state["copy"]
        self._put(sorted(name for name in fresh if not _is_marker(name)))
        later = self._look()
        if any(later.get(name) != now[name] for name in fresh if _folder(name)):
            return  # the run has begun to delete one of them
        self._put(sorted(filter(_is_marker, fresh)))
        self._delete(sorted(gone - replaced, key=_is_marker, reverse=True))
        self._keep_state({name: value for name, value in now.items() if _folder(name) not in deleting})

    def end(self) -> None:
        """Uploads the rest.

        Raises:
          UserError: another process has taken the lock, or the rest cannot be uploaded.
        """
        advice = (
            f"; to upload the rest of the run from {self.copy}, run the same command again on this machine"
        )
        with explaining(self.url, advice):
            if self.lock.is_lost():
                raise UserError(
                    f"{self.url} was deleted, or another process has taken it over, because this one could not reach it "
                    f"for a while: the run has stopped, and its files are in {self.copy}; if nothing is at {self.url} any "
                    "more, the same command on this machine continues from them"
                )
            self.upload()

    def report(self, error: Exception) -> None:
        """Says once that an upload has failed; a file that the run has deleted meanwhile is no failure."""
        vanished = isinstance(error, FileNotFoundError) and str(self.copy) in str(error.filename)
        if vanished or self._reported:
            return
        self._reported = True
        reason = in_one_line(error)
        print(
            f"{self.url} cannot be reached ({reason}): the run goes on in {self.copy}, and is uploaded when it can be",
            file=sys.stderr,
            flush=True,
        )

    def _look(self) -> dict[str, list[int] | None]:
        """Returns name -> size and time of the files of the run in the copy."""
        found: dict[str, list[int] | None] = {}
        for name in {*files_of_run(local_files(self.copy))} - _OWN:
            with contextlib.suppress(FileNotFoundError):
                status = (self.copy / name).stat()
                if not name.endswith((".tmp", ".part")):
                    found[name] = [status.st_size, status.st_mtime_ns]
        return found

    def _keep_state(self, sent: dict[str, list[int] | None]) -> None:
        self._state["sent"] = sent
        with replacing(self.copy / _STATE) as file:
            file.write(json.dumps(self._state).encode())

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, names: list[str]) -> None:
        if names:
            self._fs.put([str(self.copy / name) for name in names], [self._path(name) for name in names])

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))


@contextlib.contextmanager
def _repeating(
    work: Callable[[], None], *, seconds: float, failed: Callable[[Exception], None]
) -> Iterator[None]:
    """Calls a function every so many seconds, in a thread, during the block; its errors go to `failed`."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            try:
                work()
            except Exception as error:  # each file system has its own classes
                failed(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _folder(name: str) -> str:
    """Returns the folder of the checkpoint to which a file belongs, "checkpoints/300"; "" if it belongs to none."""
    return "/".join(name.split("/")[:2]) if "/" in name else ""


def _is_marker(name: str) -> bool:
    return name == f"{_folder(name)}/{MARKER}"
