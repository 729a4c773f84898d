"""Recognises faults of the environment, so that they are never blamed on the user's data, and explains them.

The environment is the memory, the disks, permissions, limits of the system, and the driver of a GPU. Libraries report
its faults by exceptions of many classes, so a fault is recognised by the number of the system's error, or by its text.
"""

import contextlib
import errno
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

from mlpmixer_flax import UserError

_PERMISSION = (errno.EACCES, errno.EPERM)
_OF_THE_PLACE = (*_PERMISSION, errno.EROFS)  # another place would not have them
# Number of the system's error -> the fault, and what to do; "{at}" is the place, in parentheses.
_BY_NUMBER = {
    errno.ENOSPC: "no space is left on the disk{at}: make room there",
    errno.EDQUOT: "your disk quota is used up{at}: remove files, or ask for more",
    errno.EFBIG: "the system allows no larger file{at}: raise the limit (ulimit -f), or choose another disk",
    errno.EIO: "the disk reports an input/output error{at}: check the disk and its connection",
    errno.ESTALE: "the network file system has lost a file{at}: mount it again",
    **dict.fromkeys((errno.ENOTCONN, errno.EHOSTDOWN), "the network file system does not answer{at}: mount it again"),
    errno.EROFS: "the file system is read-only{at}: choose another, or mount it again",
    errno.EMFILE: "too many files are open{at}: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine{at}: end other programs",
    errno.EAGAIN: "the system starts no more threads or processes: end other programs, or raise the limit (ulimit -u)",
    **dict.fromkeys(_PERMISSION, "you have no permission{at}: change it with chmod or chown, or choose another place"),
}  # fmt: skip
_NO_MEMORY = "not enough memory{reason}: end other programs that use it"
# Class of an exception, what its text has, the fault and what to do; "{reason}" is the text, in parentheses.
_BY_TEXT = (
    (MemoryError, "", _NO_MEMORY),
    (OSError, re.escape(os.strerror(errno.ENOMEM)), _NO_MEMORY),
    (ImportError, "failed to map segment|annot allocate memory", _NO_MEMORY),
    (RuntimeError, "RESOURCE_EXHAUSTED|[Oo]ut of memory|OUT_OF_MEMORY|STATUS_ALLOC_FAILED|std::bad_alloc", _NO_MEMORY),
    (RuntimeError, "can't start new thread", _BY_NUMBER[errno.EAGAIN]),
    (RuntimeError, "nsufficient.?[Dd]river|driver version is insufficient|DRIVER_MISMATCH|UNSUPPORTED_PTX|NO_BINARY_FOR",
     "the driver of the GPU is too old for this JAX{reason}: update the driver, or set JAX_PLATFORMS=cpu"),
    (RuntimeError, "DNN library initialization failed|CUBLAS_STATUS_NOT_INIT|CUDNN_STATUS_NOT_INIT|create cublas handle",
     "the GPU's libraries do not start{reason}: end other programs that use the GPU, or update its driver"),
    (RuntimeError, r"Worker process was terminated unexpectedly with exit code -\d",
     "a process that reads images was ended by {signal}, as the system does when memory runs out: end other programs, "
     "or lower num_workers"),
)  # fmt: skip


def explain(error: BaseException) -> str | None:
    """Returns a sentence about a fault of the environment: what it is and what to do; None for other errors.

    Notes of the exception, such as what a run has saved, follow the sentence.
    """
    sentence = _gone(error) or _explain(error)
    # Those of JAX and Grain, about their tracebacks, have several lines.
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    return sentence and "; ".join([sentence, *notes])


def is_memory(error: BaseException) -> bool:
    """Returns whether memory of the host or of a device was not enough."""
    return (_explain(error) or "").startswith(_NO_MEMORY.partition("{")[0])


def system_error(error: BaseException) -> int | None:
    """Returns the number of the system's error, from an OSError or from the text of another exception; or None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)|\[Errno (\d+)\]", text):
        return int(next(filter(None, found.groups())))
    return next((number for number in _BY_NUMBER if os.strerror(number) in text), None)


def pass_on(error: Exception, path: object = None) -> None:
    """Raises an error if the environment is at fault, in place of one that would blame a file.

    Call it first where any exception of a library is taken for a damaged file. A file that does not exist is no fault
    of the environment.

    Args:
      path: what could not be read or written; None = what the exception names.

    Raises:
      UserError: permission to read or write is missing.
      OSError: the disk or a limit of the system is at fault.
      Exception: `error`, if something else of the environment is.
    """
    number, sentence = system_error(error), _explain(error, path)
    if sentence is None:
        return
    if number in _OF_THE_PLACE:
        raise UserError(sentence) from None
    if number not in _BY_NUMBER or (path is None and isinstance(error, OSError)):
        raise error
    raise OSError(number, os.strerror(number), None if path is None else str(path)) from error


def check_reachable(path: str | os.PathLike[str]) -> None:
    """Checks that a path which seems not to exist is not only hidden from this user; call it before saying so.

    Raises:
      UserError: a folder above it may not be entered.
    """
    try:
        os.stat(path)
    except PermissionError as error:
        pass_on(error, path)
    except (OSError, ValueError):
        pass


def check_readable(folder: str | os.PathLike[str]) -> None:
    """Checks that all in a folder may be read; for libraries that take what they may not read for damaged.

    Raises:
      UserError: permission to read one of its files or folders is missing.
    """
    waiting = [os.fspath(folder)]
    while waiting:
        path = waiting.pop()
        is_folder = os.path.isdir(path)
        if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
            pass_on(PermissionError(errno.EACCES, os.strerror(errno.EACCES), path))
        waiting += [os.path.join(path, name) for name in os.listdir(path)] if is_folder else []


def start_devices() -> None:
    """Makes JAX start its devices, if it has not done so; programs call it before they do any work.

    Raises:
      UserError: they cannot be started.
    """
    import jax  # here, because importing the data part of the package loads no JAX

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        # JAX passes over "cuda" if it finds no NVIDIA GPU, and then fails an assertion.
        reason = re.sub(
            r"^Unable to initialize backend '\w+': | \((set JAX_PLA|you may need).*", "", str(error)
        )
        reason = reason.partition("\n")[0].rstrip(".")[:200] or "no GPU is found"
        chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # from JAX_PLATFORMS
        if chosen:
            raise UserError(
                f"JAX_PLATFORMS={chosen} cannot be used here ({reason}): unset it, install JAX's plugin for it, "
                "or set JAX_PLATFORMS=cpu"
            ) from error
        raise UserError(
            f"JAX cannot start a device of this machine ({reason}): repair or update its driver and JAX's plugin for "
            "it, or set JAX_PLATFORMS=cpu"
        ) from error


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an OSError of the `with` block the name of a file, which errors of open files lack."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def first_line(error: BaseException) -> str:
    """Returns the class of an exception and the first line of its message, which is safe to print."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    # Names of files may have bytes that are not UTF-8.
    return line.encode("utf-8", "backslashreplace").decode()


def in_one_line(error: BaseException) -> str:
    """Returns the beginning of an exception's message in one line, to stand in parentheses; its class if it has none."""
    return " ".join(str(error).split())[:150].rstrip(".") or type(error).__name__


def _gone(error: BaseException) -> str | None:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{_text(error.filename)} does not exist any more: restore it, or begin again"
    return None


def _explain(error: BaseException, path: object = None) -> str | None:
    number = system_error(error)
    if number in _BY_NUMBER:
        name = getattr(error, "filename", None) if path is None else path
        return _BY_NUMBER[number].format(at="" if name is None else f" ({_text(name)})")
    for kind, pattern, sentence in _BY_TEXT:
        if isinstance(error, kind) and re.search(pattern, str(error)):
            reason = str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0].rstrip(".")[:120]
            ended_by = re.search(r"exit code -(\d+)", reason)
            return sentence.format(
                reason=f" ({reason})" if reason else "",
                signal=signal.Signals(int(ended_by[1])).name if ended_by else "",
            )
    return None


def _text(name: Any) -> str:
    """Returns the name of a file, whose bytes may not be text, so that any terminal can show it."""
    return (
        os.fsencode(name).decode(errors="backslashreplace") if isinstance(name, (str, bytes)) else str(name)
    )
