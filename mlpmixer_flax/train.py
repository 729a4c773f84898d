"""Train a Mixer: python -m mlpmixer_flax.train photos/

Trains on a folder of images, photos/<class>/*.jpg, or on the dataset of a
config file. A config file describes one run; --config.KEY=VALUE changes a key
of it, and mlpmixer_flax/config.py explains all keys. A folder without a config
file is trained on with configs/folder.py, after image size, model, batch size
and length are changed to suit the images and the device.

Config, metrics and checkpoints are written into the run directory, --workdir.
To continue a run that was stopped, repeat the command with the same --workdir.
To train a run longer, also one that has ended, repeat it with a greater
--config.total_epochs.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.cli import add_distributed, make_parser, path
from mlpmixer_flax.compilation_cache import compiled_folder
from mlpmixer_flax.config import ConfigDict, get_config
from mlpmixer_flax.data.tables import is_table
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.huge_pages import uses_huge_pages
from mlpmixer_flax.remote import NothingThere, shown
from mlpmixer_flax.rundir import fetch_run
from mlpmixer_flax.text import wrap
from mlpmixer_flax.training.configfile import apply_changes, load_config, shipped_configs
from mlpmixer_flax.training.launch import start
from mlpmixer_flax.training.loop import fit
from mlpmixer_flax.training.processes import Interrupted, is_lead, together
from mlpmixer_flax.training.sizing import suit_images
from mlpmixer_flax.training.validate import read_stored

train = fit  # the name that users of this module import


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "train",
        __doc__,
        examples="  python -m mlpmixer_flax.train photos/\n"
        "  python -m mlpmixer_flax.train photos/ --config=configs/finetune_folder.py\n"
        "  python -m mlpmixer_flax.train --config=configs/mnist.py --workdir=runs/mnist \\\n"
        "      --config.total_epochs=3 --config.optimizer.learning_rate=1e-3\n"
        "configs of the package:\n" + wrap("  " + " ".join(shipped_configs())),
    )
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="folder of images, or table of their labels; short for --config.dataset=folder:FOLDER or table:FOLDER",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file; those of the package are found by name (default: configs/folder.py, adapted to FOLDER)",
    )
    add_distributed(parser)
    parser.add_argument(
        "--workdir",
        type=path,
        metavar="RUN",
        help="run directory, which may be remote, as s3://bucket/run (default: runs/CONFIG-TIME, or "
        "runs/FOLDER-TIME without --config)",
    )
    words = sys.argv[1:] if argv is None else argv
    # Apart from the others, because argparse takes a word that has a space, as in "a, b", for a FOLDER.
    changes = [word for word in words if word.startswith("--config.")]
    arguments, unknown = parser.parse_known_args([word for word in words if word not in changes])
    arguments.overrides = [*changes, *unknown]
    if not (arguments.folder or arguments.config):
        parser.error("nothing to train on: give a folder of images, such as photos/, or --config=FILE")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Exit status: 0 done, 1 the loss diverged or the machine is at fault, 2 unusable input, 128 + n stopped by signal n.
    """
    arguments = parse(argv)
    return exit_status(
        lambda: _run(arguments),
        interrupted="stopped at once; the run can continue from its newest checkpoint, if it has one",
    )


def _run(arguments: argparse.Namespace) -> int:
    start(arguments.distributed)
    with together():
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if is_lead() and (used := _describe_process()):
        print(used, flush=True)
    subject = Path(arguments.config or os.path.abspath(arguments.folder)).stem
    name = f"{subject}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Of several processes, the first one decides on the directory.
    given = arguments.workdir or (None if is_lead() else Path())
    try:
        with contextlib.nullcontext(given) if given else _new_workdir(name) as workdir:
            train(config, workdir, distributed=arguments.distributed)
    except Interrupted as stop:
        print(f"{stop}; the same command with --workdir={shown(workdir)} continues from there")
        return 128 + stop.number
    return 0


def _describe_process() -> str:
    """Returns what was changed in this process for speed, as a line; "" if nothing was."""
    used = ["huge pages"] * uses_huge_pages() + ["compiled programs are kept"] * bool(compiled_folder())
    return f"for speed: {', '.join(used)}; see docs/performance.md" if used else ""


def _config(arguments: argparse.Namespace) -> ConfigDict:
    """Returns the config of the run; prints what was chosen for a folder without a config file."""
    overrides = arguments.overrides
    if arguments.folder:
        if other := next((word for word in overrides if word.startswith("--config.dataset=")), ""):
            raise UserError(f"{arguments.folder} and {other} are two datasets: leave one of them out")
        kind = "table" if is_table(arguments.folder) else "folder"
        overrides = [f"--config.dataset={kind}:{arguments.folder}", *overrides]
    if arguments.config:
        return load_config(arguments.config, overrides)
    config = get_config()
    apply_changes(config, overrides)  # so a wrong key is found before the images are looked at
    chosen = suit_images(config.dataset, backend=jax.default_backend(), num_devices=jax.device_count())
    stored = {}
    if arguments.workdir:
        with contextlib.suppress(NothingThere):
            stored = flatten_dict(read_stored(fetch_run(arguments.workdir)), sep=".")
    changes = [f"--config.{key}={stored.get(key, value)}" for key, value in chosen.items()]
    given = [argument.partition("=")[0] for argument in overrides]
    new = [change.removeprefix("--config.") for change in changes if change.partition("=")[0] not in given]
    if new and not stored:
        print(
            "configs/folder.py, with values that suit the images and the device:",
            wrap("  " + ", ".join(new)),
            sep="\n",
            flush=True,
        )
    return load_config("folder.py", [*changes, *overrides])


@contextlib.contextmanager
def _new_workdir(name: str) -> Iterator[Path]:
    """Creates runs/NAME, or runs/NAME-2 and so on if another run has that name; removes it if it stays empty.

    Raises:
      UserError: it cannot be created.
    """
    runs = Path("runs")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    try:
        is_new = not runs.exists()
        while True:
            workdir = runs / next(names)
            with contextlib.suppress(FileExistsError):  # two runs may start in the same second
                workdir.mkdir(parents=True)
                break
    except OSError as error:
        pass_on(error, runs.absolute())
        raise UserError(
            f"cannot create a directory in {runs.absolute()} ({error.strerror}): give --workdir"
        ) from None
    try:
        yield workdir
    finally:
        with contextlib.suppress(OSError):  # it is not empty, because the run has begun
            workdir.rmdir()
            if is_new:
                runs.rmdir()


if __name__ == "__main__":
    leave(main())
