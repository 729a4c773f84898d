"""What programs share in the terminal: how they end, and names in columns, whatever their script."""

import io
import logging
import os
import signal
import sys
import unicodedata
import warnings
from collections.abc import Callable

from mlpmixer_flax import UserError


def exit_status(program: Callable[[], int | None], *, interrupted: str = "") -> int:
    """Runs a program, says in a sentence what ends it early, and returns its exit status.

    That is what the program returns, None being 0; 1 if its loss diverged or its output was closed, 2 for a
    UserError, and 130 for Ctrl-C, of which `interrupted` is said.
    """
    # Orbax and TFDS warn of what is meant to be, the hub of each of its tries, Matplotlib of weights of fonts.
    for name in ("absl", "huggingface_hub", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # of images, without their names
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name may be no text, or none in the terminal's encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return program() or 0
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # by a reader that has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT


def check_positive(**counts: int) -> None:
    """Raises UserError where a count, given by its name, is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count} leaves nothing to do: give at least 1")


def width(text: str) -> int:
    """How many columns a text takes: two a character in Chinese, none an accent of its own."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def printable(text: str) -> str:
    """The text; escaped, where a terminal would act on a character instead of showing it."""
    return text if text.isprintable() else repr(text)[1:-1]


def shorten(name: str, columns: int) -> str:
    """A name whole or, where that doesn't fit, the start of it."""
    name = printable(name)
    while width(name) > columns:
        name = name[:-2] + "…"
    return name


def pad(name: str, columns: int) -> str:
    """`shorten`, filled with spaces on the right."""
    name = shorten(name, columns)
    return name + " " * (columns - width(name))
