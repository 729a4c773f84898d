"""How large a model is: python -m mlpmixer_flax.summary --workdir=runs/b16

A line for each part: the shape of its output for one image, its parameters and
its multiply-accumulates (MACs), those of convolution and dense layers. Below
stand the totals and, with --config and --workdir, the memory that the optimizer
takes beside the parameters.

Nothing is computed, and published weights are not downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mlpmixer_flax import UserError, pretrained
from mlpmixer_flax.config import resolve
from mlpmixer_flax.configfile import load_config
from mlpmixer_flax.dataloader import get_dataset_info
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.published import PUBLISHED
from mlpmixer_flax.step import make_optimizer, split_frozen
from mlpmixer_flax.tabulate import summarize
from mlpmixer_flax.terminal import exit_status
from mlpmixer_flax.trained import add_names, load_run, model_of


def summarize_config(path: str, overrides: Sequence[str] = (), *, num_classes: int | None = None) -> str:
    """The table of what a config trains; `path` and `overrides` are those of `load_config`.

    With `num_classes` the dataset isn't opened, and colour images are assumed.

    Raises:
      UserError: as load_config, or the dataset isn't at hand.
    """
    config = load_config(path, overrides)
    channels = 3
    if num_classes is None:
        try:
            info = get_dataset_info(config.dataset, config.train_split, data_dir=config.data_dir)
        except UserError as error:
            raise UserError(f"{error} Or give --num_classes, and the data isn't needed.") from None
        num_classes, channels = info["num_classes"], info["image_shape"][2]
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes} leaves nothing to classify: give at least 1")
    size_px = config.preprocess.image_size_px
    model = MlpMixer(num_classes=num_classes, **resolve(config, {}).model.to_dict())
    return _summarize(model, (size_px, size_px, channels), config)


def summarize_run(workdir: Path) -> str:
    """The table of a run; UserError as `load_run`."""
    trained = load_run(workdir)
    size_px = trained.preprocess["image_size_px"]
    return _summarize(trained.model, (size_px, size_px, trained.channels), ConfigDict(trained.config))


def summarize_weights(source: str) -> str:
    """The table of weights, named as in `pretrained.load`; UserError as that, or where they have no head."""
    if source in PUBLISHED:
        published = PUBLISHED[source]
        size_px = published.origin["preprocess"]["image_size_px"]
        model = MlpMixer(num_classes=published.num_classes, **published.origin["model"])
        return _summarize(model, (size_px, size_px, 3))
    return _summarize(*model_of(pretrained.find(source), source))


def _summarize(model: MlpMixer, image_shape: tuple[int, int, int], config: ConfigDict | None = None) -> str:
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(lambda images: model.init(jax.random.key(0), images), images)["params"]
    opt_state = None
    if config is not None:
        learning, _ = split_frozen(params, config.freeze)
        # Of a schedule only a counter is kept, whatever it is.
        opt_state = jax.eval_shape(make_optimizer(config, lambda step: 0.0).init, learning)
    return summarize(model, image_shape, params=params, opt_state=opt_state)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.summary",
        usage="%(prog)s --config=FILE [--config.KEY=VALUE ...]\n"
        "       %(prog)s --config=FILE --num_classes=N\n"
        "       %(prog)s --workdir=RUN\n"
        "       %(prog)s --weights=NAME",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m mlpmixer_flax.summary --config=configs/b16_cifar10.py \\\n"
        "      --config.model.num_blocks=6 --config.optimizer.name=adamw\n"
        "  python -m mlpmixer_flax.summary --config=configs/l16_imagenet.py \\\n"
        "      --num_classes=1000\n"
        "  python -m mlpmixer_flax.summary --workdir=runs/b16\n"
        "  python -m mlpmixer_flax.summary --weights=imagenet21k/Mixer-L_16",
    )
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("--config", help="config file; --config.KEY=VALUE changes a key of it")
    add_names(named)
    parser.add_argument(
        "--num_classes",
        type=int,
        help="with --config: the size of the head, for images with 3 channels; else "
        "both are those of the config's dataset, which must be at hand",
    )
    arguments, arguments.overrides = parser.parse_known_args(argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.config:
        print(summarize_config(arguments.config, arguments.overrides, num_classes=arguments.num_classes))
    elif arguments.overrides or arguments.num_classes is not None:
        extra = " ".join(arguments.overrides) or f"--num_classes={arguments.num_classes}"
        raise UserError(f"{extra} cannot be used without --config: leave it out")
    elif arguments.workdir:
        print(summarize_run(arguments.workdir))
    else:
        print(summarize_weights(arguments.weights))


if __name__ == "__main__":
    sys.exit(main())
