"""Options that several programs have: which model, which dataset, how to find other processes."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import check_no_url
from mlpmixer_flax.faults import start_devices
from mlpmixer_flax.inference.load import load, load_run
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.limits import check_limits
from mlpmixer_flax.models import check_patch
from mlpmixer_flax.remote import copy_of
from mlpmixer_flax.run_weights import default_checkpoint, describe_weights, score_of
from mlpmixer_flax.rundir import fetch_run
from mlpmixer_flax.weights.source import named_run


def make_parser(
    program: str, description: str | None, *, examples: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """Returns a parser for a program, whose --help shows a description (usually the docstring) and examples."""
    return argparse.ArgumentParser(
        allow_abbrev=False,
        prog=f"python -m mlpmixer_flax.{program}",
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=examples and f"examples:\n{examples}",
    )


def path(text: str) -> Path:
    """Returns the path that an option gives, with "~" expanded; the `type` of every option that is a path.

    Of a remote path, such as s3://bucket/run, it is the place of its copy; nothing is copied yet.

    Raises:
      argparse.ArgumentTypeError: it is empty, a URL such as https://example.org, or there is no such home directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a path")
    try:
        if copy := copy_of(text):
            return copy
        check_no_url(text, name="")
        return Path(text).expanduser()
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
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
    parser.add_argument(
        "--image_size_px",
        type=int,
        metavar="N",
        help="use the model for images of this side: its token mixing is resampled (default: the model's own size)",
    )


def load_model(arguments: argparse.Namespace) -> Model:
    """Loads the model that the options of `add_model` name; prints which weights of a run these are.

    If --image_size_px is the model's own size, it becomes None in `arguments`, as without the option.

    Raises:
      UserError: as `load`, `Model.at_size` and `start_devices`, or --checkpoint is given for weights.
    """
    size_px = arguments.image_size_px
    if size_px is not None:
        check_limits("preprocess.image_size_px", size_px, name="--image_size_px")
    model = _load_model(arguments)
    own_px = model.preprocess["image_size_px"]
    if size_px is None or size_px == own_px:
        arguments.image_size_px = None
        return model
    check_patch(model.module.patches["size"], (size_px, size_px), change="--image_size_px")
    sized = model.at_size(size_px)
    score = score_of(sized.scores, model.config.get("best_by", "accuracy"))
    print(
        f"{size_px} px instead of {own_px} px: token mixing resampled"
        + (f" ({score})" if score else "")
        + (
            ""
            if size_px in model.resolutions_px
            else "; a model that was not trained with this size is less accurate"
        ),
        flush=True,
    )
    return sized


def _load_model(arguments: argparse.Namespace) -> Model:
    start_devices()
    workdir, checkpoint = arguments.workdir, arguments.checkpoint
    if workdir is None:
        if checkpoint:
            raise UserError(f"--checkpoint={checkpoint} is for --workdir only: leave it out with --weights")
        run = named_run(arguments.weights)
        if run is None:
            return load(arguments.weights)
        workdir, checkpoint = run
    workdir = fetch_run(workdir)
    checkpoint = checkpoint or default_checkpoint(workdir)
    model = load_run(workdir, checkpoint)
    scored_px = model.preprocess["image_size_px"] if arguments.image_size_px else 0
    print(
        f"using {describe_weights(workdir, checkpoint, step=model.step or 0, size_px=scored_px)}", flush=True
    )
    return model


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says how a process finds the other processes of the program."""
    parser.add_argument(
        "--distributed",
        default="auto",
        metavar="HOW",
        help="several processes: auto (found under Slurm, Open MPI 4, on TPUs and Kubernetes), off, or "
        "COORDINATOR,N,I: this is process I from 0 of N, and process 0 is at COORDINATOR, address:port (default: auto)",
    )


def add_alone(parser: argparse.ArgumentParser) -> None:
    """Adds the option of a program that works in one process; `launch.check_alone` refuses to be one of several."""
    parser.add_argument(
        "--distributed",
        choices=("auto", "off"),
        default="auto",
        help="auto: refuse if this is one of several tasks; off: go on (default: auto)",
    )


def add_flip(parser: argparse.ArgumentParser, *, effect: str) -> None:
    """Adds the option for `Model.flip`; `effect` says what the program then does."""
    parser.add_argument(
        "--flip",
        action="store_true",
        help=f"{effect} the mean of the logits of each image and its mirror image: slower, and often a little more "
        "accurate",
    )


def parse_names(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of a program that takes names of files, anywhere among them; after "--" all are names."""
    argv = sys.argv[1:] if argv is None else argv
    if "--" in argv:
        # argparse forgets this mark, and then takes the name "-x.png" for an option.
        end = argv.index("--")
        names = (f"./{name}" if name.startswith("-") else name for name in argv[end + 1 :])
        argv = [*argv[:end], *names]
    return parser.parse_intermixed_args(argv)


def add_dataset(group: argparse._ActionsContainer) -> None:
    """Adds the options that name a dataset; each program adds its own options for splits."""
    group.add_argument(
        "--dataset",
        metavar="NAME",
        help='TFDS name, "digits", folder:PATH or table:FILE (default: the dataset of the run)',
    )
    group.add_argument(
        "--data_dir",
        metavar="DIR",
        help="TFDS directory (default: without --dataset that of the run, else $TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )
    group.add_argument("--skip_bad_images", action="store_true", help="leave out images that cannot be used")


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
