"""Print the size of a model: python -m mlpmixer_flax.summary --workdir=runs/b16

The table has one line per part of the model: the shape of its output for one
image, its parameters, and the multiply-accumulates (MACs) of its convolutions
and dense layers. Below are the totals and, with --config or --workdir, the
memory that the optimizer needs in addition to the parameters.

The model does not run, and published weights are not downloaded.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from mlpmixer_flax import UserError
from mlpmixer_flax.cli import add_names, make_parser
from mlpmixer_flax.config import ConfigDict, resolve
from mlpmixer_flax.dataloader import get_dataset_info
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.limits import check_limits, check_positive
from mlpmixer_flax.models import MlpMixer, check_patch
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.optimizer import make_optimizer, split_frozen
from mlpmixer_flax.training.table import summarize
from mlpmixer_flax.weights.module import module_of
from mlpmixer_flax.weights.source import find, published_as


def summarize_config(path: str, overrides: Sequence[str] = (), *, num_classes: int | None = None) -> str:
    """Returns the table of the model that a config trains; `path` and `overrides` are those of `load_config`.

    With `num_classes` the dataset is not opened, and images are assumed to have 3 channels.

    Raises:
      UserError: as `load_config`; or the dataset cannot be opened.
    """
    config = load_config(path, overrides)
    channels = 3
    if num_classes is None:
        try:
            info = get_dataset_info(config.dataset, config.train_split, data_dir=config.data_dir)
        except UserError as error:
            raise UserError(f"without --num_classes the dataset is needed, but {error}") from None
        num_classes, channels = info["num_classes"], info["image_shape"][2]
    check_positive(num_classes=num_classes)
    size_px = config.preprocess.image_size_px
    module = MlpMixer(num_classes=num_classes, **resolve(config, {}).model.to_dict())
    return _summarize(module, (size_px, size_px, channels), config)


def summarize_run(workdir: str | Path, *, size_px: int | None = None) -> str:
    """Returns the table of a run; `size_px` is the size of the images, None = that of the run.

    Raises:
      UserError: as `load_run`, or the model cannot have images of this size.
    """
    model = load_run(workdir)
    own_px = model.preprocess["image_size_px"]
    image_shape = _image_shape(model.module, (own_px, own_px, model.channels), size_px)
    return _summarize(model.module, image_shape, ConfigDict(model.config))


def summarize_weights(source: str, *, size_px: int | None = None) -> str:
    """Returns the table of weights; `size_px` is the size of the images, None = that of the weights.

    Raises:
      UserError: the weights cannot be found or have no head, or cannot have images of this size.
    """
    if published := published_as(source):
        own_px = published.origin["preprocess"]["image_size_px"]
        own_shape = (own_px, own_px, 3)
        module = MlpMixer(num_classes=published.num_classes, **published.origin["model"])
    else:
        module, own_shape = module_of(find(source), source)
    return _summarize(module, _image_shape(module, own_shape, size_px))


def _image_shape(
    module: MlpMixer, own_shape: tuple[int, int, int], size_px: int | None
) -> tuple[int, int, int]:
    """Returns the shape of images of a size, None = the model's own; raises UserError if it cannot have this size."""
    if size_px is None:
        return own_shape
    check_limits("preprocess.image_size_px", size_px, name="--image_size_px")
    check_patch(module.patches["size"], (size_px, size_px), change="--image_size_px")
    return size_px, size_px, own_shape[2]


def _summarize(module: MlpMixer, image_shape: tuple[int, int, int], config: ConfigDict | None = None) -> str:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(lambda images: module.init(jax.random.key(0), images), images)["params"]
    opt_state = None
    if config is not None:
        learning, _ = split_frozen(params, config.freeze)
        # Any schedule will do, because the state holds only a counter for it.
        opt_state = jax.eval_shape(make_optimizer(config, lambda step: 0.0).init, learning)
    return summarize(module, image_shape, params=params, opt_state=opt_state)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "summary",
        __doc__,
        usage="%(prog)s --config=FILE [--config.KEY=VALUE ...]\n"
        "       %(prog)s --config=FILE --num_classes=N\n"
        "       %(prog)s --workdir=RUN [--image_size_px=N]\n"
        "       %(prog)s --weights=NAME [--image_size_px=N]",
        examples="  python -m mlpmixer_flax.summary --config=configs/b16_cifar10.py \\\n"
        "      --config.model.num_blocks=6 --config.optimizer.name=adamw\n"
        "  python -m mlpmixer_flax.summary --config=configs/l16_imagenet.py \\\n"
        "      --num_classes=1000\n"
        "  python -m mlpmixer_flax.summary --workdir=runs/b16\n"
        "  python -m mlpmixer_flax.summary --weights=imagenet21k/Mixer-L_16",
    )
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("--config", metavar="FILE", help="config file; --config.KEY=VALUE changes a key of it")
    add_names(named)
    parser.add_argument(
        "--num_classes",
        type=int,
        metavar="N",
        help="with --config: number of classes, for images with 3 channels (default: both as in the config's "
        "dataset, which must then be prepared)",
    )
    parser.add_argument(
        "--image_size_px",
        type=int,
        metavar="N",
        help="with --workdir or --weights: for images of this side (default: the model's own size)",
    )
    arguments, arguments.overrides = parser.parse_known_args(argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


def _check_options(arguments: argparse.Namespace) -> None:
    """Checks the options that the parser does not know: only --config.KEY=VALUE may be among them.

    Raises:
      UserError: one is similar to an option of this program, or there is no config that it could change.
    """
    own = [f"--{option}" for option in vars(arguments).keys() - {"overrides"}]
    for argument in arguments.overrides:
        name, equals, value = argument.partition("=")
        if name.startswith("--config."):
            continue
        if near := difflib.get_close_matches(name, own, n=1, cutoff=0.75):
            raise UserError(f"cannot use {argument!r}: did you mean {near[0]}{equals}{value}?")
        if arguments.config is None:
            raise UserError(f"cannot use {argument!r}: --help lists all options")


def _run(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    size_px = arguments.image_size_px
    if arguments.config is not None and size_px is not None:
        raise UserError(
            f"--image_size_px={size_px} is for --workdir and --weights: give --config.preprocess.image_size_px={size_px}"
        )
    if arguments.config is not None:
        print(summarize_config(arguments.config, arguments.overrides, num_classes=arguments.num_classes))
    elif arguments.overrides or arguments.num_classes is not None:
        extra = " ".join(arguments.overrides) or f"--num_classes={arguments.num_classes}"
        raise UserError(f"{extra} has no meaning without --config: remove it")
    elif arguments.workdir:
        print(summarize_run(arguments.workdir, size_px=size_px))
    else:
        print(summarize_weights(arguments.weights, size_px=size_px))


if __name__ == "__main__":
    leave(main())
