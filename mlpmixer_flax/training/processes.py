"""What the processes of one run agree on, and how they end together.

A run with one process does nothing here.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import explain

T = TypeVar("T")


class Agreed(Exception):
    """Something that all processes of a run raise at the same place, so that each can end by itself."""


class AgreedError(UserError, Agreed):
    """An error of one process, raised in all."""


class Interrupted(Agreed):
    """A signal asked the run to stop, and the run has saved a checkpoint."""

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.number = number  # of the signal
        self.step = step  # the step of the checkpoint

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name}: saved step {self.step}"


def is_lead() -> bool:
    """Returns whether this process prints and writes: the first one, or the only one. Starts no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the values that all processes give, by process; they are plain data, as in JSON.

    All processes must call it at the same place.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    # Powers of two, because each size is compiled.
    padded = np.zeros(1 << (int(sizes.max()) - 1).bit_length(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]


@contextlib.contextmanager
def same_fate() -> Iterator[None]:
    """Raises a UserError of one process in all of them, at the end of the block.

    In the block, a process must not wait for others.
    """
    if jax.process_count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    texts = gather(failure and str(failure))
    if failure:
        raise AgreedError(str(failure)) from failure
    for index, text in enumerate(texts):
        if text is not None:
            raise AgreedError(f"process {index}: {text}")


def from_lead(make: Callable[[], T]) -> T:
    """Returns what the first process makes, plain data as in JSON; its UserError is raised in all processes."""
    if jax.process_count() == 1:
        return make()
    with same_fate():
        value = make() if is_lead() else None
    return gather(value)[0]


def check_same(what: str, value: dict[str, Any], *, advice: str) -> None:
    """Checks that all processes have the same value.

    Raises:
      AgreedError: one has another; the message begins with `what`, names the keys and ends with `advice`.
    """
    first, *others = gather(value)
    for index, other in enumerate(others, 1):
        differences = [
            f"{key} is {other[key]!r}, not {first[key]!r}" for key in first if other[key] != first[key]
        ]
        if differences:
            raise AgreedError(
                f"process {index} has {what} that differs from that of process 0 ({', '.join(differences[:3])}): {advice}"
            )


def check_shared(folder: Path, *, seconds: float = 60) -> None:
    """Waits until all processes see a folder that the first process has created.

    Network file systems may need a minute.

    Raises:
      AgreedError: a process does not see it.
    """
    with same_fate():
        end = time.monotonic() + seconds
        while jax.process_count() > 1 and not folder.exists():
            if time.monotonic() > end:
                raise UserError(
                    f"{folder} is not on this machine: choose a directory that all machines share"
                )
            time.sleep(0.5)


# --- one fails, all end

_KEYS = "mlpmixer_flax"  # in the key-value store of JAX's coordination service
_watching = threading.Lock()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all processes of a run if one of them fails in the block; there, only the first one prints to stdout.

    Without this, the others would wait for the failed process in a collective operation.
    """
    if jax.process_count() == 1 or not _watching.acquire(blocking=False):  # an outer block watches already
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
    watcher.start()
    try:
        with contextlib.ExitStack() as stack:
            if not is_lead():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(ending_all())
            yield
    finally:
        done.set()
        watcher.join()
        _watching.release()


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Ends all processes if the block raises an error in one of them, before anything around it is closed."""
    try:
        yield
    except BaseException as error:
        # A metric that is not finite is the same in all processes.
        if jax.process_count() > 1 and not isinstance(error, (Agreed, FloatingPointError)):
            _tell(error)
        raise


def _tell(error: BaseException) -> None:
    """Tells all processes about an error of this one; the watcher of each process then ends it."""
    if isinstance(error, UserError):
        status, text = 2, str(error)
    elif isinstance(error, KeyboardInterrupt):
        status, text = 128 + signal.SIGINT, "stopped at once"
    elif sentence := explain(error):
        status, text = 1, sentence
    else:
        # If it comes from a collective operation, its cause is in another process, and a traceback says nothing.
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exception(error)
        status, text = 1, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    # Without process 0 nobody can be told, and JAX ends all.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_KEYS}/failed/{jax.process_index()}", json.dumps([status, text]))
    time.sleep(60)  # the watcher ends the process within seconds


def _client() -> Any:
    """Returns the client of JAX's coordination service; JAX has no public access to its key-value store."""
    from jax._src import distributed

    return distributed.global_state.client


def _watch(done: threading.Event) -> None:
    """Ends this process soon after any process has told of an error; runs in a thread until `done` is set."""
    while not done.wait(1):
        failed = {}
        with contextlib.suppress(
            jax.errors.JaxRuntimeError
        ):  # if process 0 has been killed, JAX ends this one
            failed = {index: json.loads(text) for index, text in _read("failed").items()}
        if failed:
            _end(failed)


def _read(name: str) -> dict[int, str]:
    """Returns the values of a name by process."""
    return {
        int(key.rpartition("/")[2]): value for key, value in _client().key_value_dir_get(f"{_KEYS}/{name}/")
    }


def _end(failed: Mapping[int, tuple[int, str]]) -> None:
    """Ends this process at once, after the first one has printed why.

    At once, because the main thread waits for other processes and cannot be interrupted.

    Args:
      failed: (exit status, error) by process. Status 1 may be a mere consequence of another error.
    """
    index, (status, text) = min(failed.items(), key=lambda item: (item[1][0] == 1, item[0]))
    text = text if index == 0 else f"process {index}: {text}"
    # Errors of the service mean that process 0 has ended already.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_KEYS}/here/{jax.process_index()}", "")
        if is_lead():
            missing = _wait(lambda: set(range(jax.process_count())) - _read("here").keys())
            if missing and status == 1:
                text = f"process {min(missing)} ended without an error message: it was killed, or its machine failed"
            sys.stdout.flush()
            os.write(2, f"error: {text}\n".encode(errors="backslashreplace"))
            _client().key_value_set(f"{_KEYS}/told/0", "")
            time.sleep(1.5)  # the others read it meanwhile: the service ends with this process
        else:
            _wait(lambda: not _read("told"))
    os._exit(status)


def _wait(left: Callable[[], T]) -> T:
    """Calls a function until nothing is left, for at most 10 s; returns what it returned last."""
    end = time.monotonic() + 10
    while (found := left()) and time.monotonic() < end:
        time.sleep(0.2)
    return found
