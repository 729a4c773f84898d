"""Shared by all programs: options that name a model or a dataset, exit status, and text in columns."""

import argparse
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from rich.cells import cell_len, chop_cells, set_cell_size

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.load import load, load_run
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.rundir import default_checkpoint, describe_weights
from mlpmixer_flax.weights.source import named_run

# --- options


def make_parser(
    program: str, description: str | None, *, examples: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """Returns a parser for a program, whose --help shows a description (usually the docstring) and examples."""
    return argparse.ArgumentParser(
        prog=f"python -m mlpmixer_flax.{program}",
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=examples and f"examples:\n{examples}",
    )


def path(text: str) -> Path:
    """Returns the path that an option gives, with "~" expanded; the `type` of every option that is a path.

    Raises:
      argparse.ArgumentTypeError: it is empty, or there is no such home directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({error}): give another path") from None


def add_names(group: argparse._ActionsContainer) -> None:
    """Adds the two options that name a model, --workdir and --weights; the user gives one of them."""
    group.add_argument("--workdir", type=path, metavar="RUN", help="run directory")
    group.add_argument(
        "--weights",
        metavar="NAME",
        help="published name, file or URL; see python -m mlpmixer_flax.pretrained --help",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a model and choose its weights."""
    add_names(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="which weights of the run: best, last, ema, or a saved step such as 300 (default: best, if the run was "
        "evaluated)",
    )


def load_model(arguments: argparse.Namespace) -> Model:
    """Loads the model that the options of `add_model` name; prints which weights of a run these are.

    Raises:
      UserError: as `load`, or --checkpoint is given for weights.
    """
    workdir, checkpoint = arguments.workdir, arguments.checkpoint
    if workdir is None:
        if checkpoint:
            raise UserError(f"--checkpoint={checkpoint} is for --workdir only: leave it out with --weights")
        run = named_run(arguments.weights)
        if run is None:
            return load(arguments.weights)
        workdir, checkpoint = run
    checkpoint = checkpoint or default_checkpoint(workdir)
    model = load_run(workdir, checkpoint)
    print(f"using {describe_weights(workdir, checkpoint, step=model.step or 0)}", flush=True)
    return model


def add_dataset(group: argparse._ActionsContainer) -> None:
    """Adds the options that name a dataset; each program adds its own options for splits."""
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help='TFDS name, "digits" or folder:PATH (default: the dataset of the run)',
    )
    group.add_argument(
        "--data_dir",
        metavar="DIR",
        help="TFDS directory (default: that of the run, else $TFDS_DATA_DIR)",
    )
    group.add_argument(
        "--skip_bad_images", action="store_true", help="leave out images of a folder that cannot be used"
    )


@dataclass(frozen=True)
class NamedDataset:
    """A dataset and its splits; the fields are keys of a config."""

    dataset: str
    data_dir: str = ""
    skip_bad_images: bool = False
    train_split: str = "train"
    test_split: str = "test"


def check_dataset(arguments: argparse.Namespace) -> None:
    """Raises UserError if the options name no dataset; call it before weights are downloaded."""
    if not arguments.dataset and arguments.workdir is None and named_run(arguments.weights) is None:
        raise UserError(f"{arguments.weights} is not a run and has no dataset of its own: give --dataset")


def named_dataset(arguments: argparse.Namespace, model: Model) -> NamedDataset:
    """Returns the dataset that the options of `add_dataset` name.

    Without --dataset it is the dataset of the run; options that are not given then come from the run's config.

    Raises:
      UserError: as `check_dataset`.
    """
    check_dataset(arguments)
    own = {} if arguments.dataset else model.config
    keys = [field.name for field in fields(NamedDataset)]
    given = {key: vars(arguments).get(key) or own.get(key) for key in keys}
    return NamedDataset(**{key: value for key, value in given.items() if value})


# --- exit status


def exit_status(program: Callable[[], int | None], *, interrupted: str = "") -> int:
    """Runs a program, prints an error without a traceback, and returns the exit status.

    The status is what the program returns (None = 0); 1 if the loss diverged or nobody reads the output any
    more; 2 for a UserError; 130 for Ctrl-C, after printing `interrupted`.
    """
    # Orbax and TFDS warn about normal things, the hub about every retry, Matplotlib about weights of fonts.
    for name in ("absl", "huggingface_hub", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="PIL")  # about images, without their file names
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name may be invalid text, or have characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return program() or 0
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT


# --- text in columns: a Chinese character needs two columns, a combining accent none


def printable(text: str) -> str:
    """Returns the text, escaped if it has characters that control the terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def shorten(text: str, columns: int) -> str:
    """Returns the text, or its start and "…" if it needs more columns."""
    text = printable(text)
    return text if cell_len(text) <= columns else chop_cells(text, columns - 1)[0] + "…"


def shorten_start(text: str, columns: int) -> str:
    """Returns the text, or "…" and its end if it needs more columns: for paths, whose end says most."""
    text = printable(text)
    if cell_len(text) <= columns:
        return text
    while cell_len(text) > columns - 1:
        text = text[1:]
    return "…" + text


def pad(text: str, columns: int) -> str:
    """Returns the text in exactly this many columns: shortened, or filled with spaces on the right."""
    return set_cell_size(shorten(text, columns), columns)
