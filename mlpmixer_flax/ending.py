"""How programs end: the exit status, and errors as one sentence."""

import _thread
import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, cast

import jax

from mlpmixer_flax import UserError
from mlpmixer_flax.compilation_cache import keep_compiled
from mlpmixer_flax.faults import explain
from mlpmixer_flax.text import printable
from mlpmixer_flax.training.processes import Interrupted, is_lead

_LOG_LEVELS = {
    "absl": logging.CRITICAL,  # Orbax and TFDS warn about normal things; Orbax logs each error that it also raises
    "asyncio": logging.CRITICAL,  # reports each file of a save that has failed
    "huggingface_hub": logging.ERROR,  # warns about every retry
    "matplotlib.font_manager": logging.ERROR,  # warns about weights of fonts
    "PIL": logging.CRITICAL,  # logs some of the errors that it also raises, without the name of the file
}
_LONGEST_LINE = 1000  # of an error; names of files and classes in it may be longer


class _Escaping:
    """A stream for people: what is printed to it cannot control the terminal, except that tqdm may draw its bars.

    So a program prints a name inside a text, and not as an argument of its own: a \\r at the start is taken for a bar.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        # tqdm begins a text with \r to draw over a bar, and writes the code for "one line up" alone.
        of_bars = re.match(r"\r|(\x1b\[A)+\Z|", text)
        start = of_bars[0] if of_bars else ""
        return self._stream.write(start + printable(text[len(start) :], but="\n"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def exit_status(program: Callable[[], int | None], *, interrupted: str = "", data: bool = False) -> int:
    """Runs a program, prints an error without a traceback, and returns the exit status.

    All that the program prints is escaped, so that no name can control the terminal. With `data`, what it prints to
    stdout is for another program, and is escaped only if stdout is a terminal.

    The status is what the program returns (None = 0); 1 if the loss diverged, nobody reads the output any more, or
    the environment is at fault (memory, disk, driver); 2 for a UserError or a missing permission; 130 for Ctrl-C,
    after printing `interrupted`; 128 + n if signal n stopped a training after a checkpoint. Any other exception is a
    bug and keeps its traceback.
    """
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see `quiet_ctrl_c`
    # Without a place for files, programs only start more slowly.
    with contextlib.suppress(UserError, OSError):
        keep_compiled()
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    sys.unraisablehook = _report_unraisable
    warnings.filterwarnings(
        "ignore", "coroutine .* was never awaited", RuntimeWarning
    )  # as the log of asyncio
    warnings.filterwarnings("ignore", module="PIL")  # about images, without their file names
    _open_missing_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name may be invalid text, or have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.ExitStack() as streams:
        if sys.stdout.isatty() or not data:
            streams.enter_context(contextlib.redirect_stdout(cast(TextIO, _Escaping(sys.stdout))))
        streams.enter_context(contextlib.redirect_stderr(cast(TextIO, _Escaping(sys.stderr))))
        return _run(program, interrupted)


def _open_missing_streams() -> None:
    """Opens streams that the caller has closed (`2>&-`) to nowhere; otherwise the next file would get their number."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _run(program: Callable[[], int | None], interrupted: str) -> int:
    """Runs a program, and returns the exit status as `exit_status`."""
    try:
        status = program() or 0
        sys.stdout.flush()  # here, so that a full disk is noticed
        return status
    except (UserError, FloatingPointError) as error:
        _print_error(str(error))
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _drop_output()
        return 1
    except Interrupted as stop:  # train itself prints a longer sentence
        if is_lead():
            print(f"{stop}; the same command continues", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        if interrupted and is_lead():
            print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        _print_error(sentence)
        return 2 if isinstance(error, PermissionError) else 1


def leave(status: int) -> NoReturn:
    """Ends the process with an exit status; the last call of every program.

    After Ctrl-C it skips Python's normal shutdown, which can crash while XLA compiles. With several processes it does
    not skip it, because that shutdown tells the other processes.
    """
    if status == 128 + signal.SIGINT and not jax.distributed.is_initialized():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _print_error(text: str) -> None:
    """Prints an error, without the middle of lines that are very long."""
    if not is_lead():  # of several processes
        return
    try:
        sys.stdout.flush()  # first what was printed before, also if both go into one file
    except OSError:
        _drop_output()
    half = _LONGEST_LINE // 2
    lines = [
        line if len(line) <= _LONGEST_LINE else f"{line[:half]}…{line[-half:]}"
        for line in map(printable, text.split("\n"))
    ]
    print("error:", "\n".join(lines), file=sys.stderr)


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Reports an exception that nothing can catch, except those of the rest of a save that has failed already."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Ctrl-C arrived inside such a call and was lost: send it again.
        threading.Timer(0.05, _thread.interrupt_main).start()
    elif str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _drop_output() -> None:
    """Lets what is not yet written of the output go nowhere, so that Python's end does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
