"""A trained model by name, for every program that comes after training: --workdir=RUN or --weights=NAME."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax import UserError, augment, pretrained
from mlpmixer_flax.checkpoint import read_class_names, read_config, read_weights
from mlpmixer_flax.download import fetch
from mlpmixer_flax.fit import sizes_of
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.step import Params

# Of a run's head or of published weights: scores -> probabilities of the classes.
PROBABILITIES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


# Of Big Transfer, which was trained on the same classes in the same order.
IMAGENET21K_NAMES = "https://storage.googleapis.com/bit_models/imagenet21k_wordnet_lemmas.txt"


@dataclass(frozen=True)
class Trained:
    """A model with its weights and all that is needed to use it."""

    name: str  # as the user gave it
    model: MlpMixer
    params: Params  # float32 numpy arrays
    preprocess: Mapping[
        str, Any
    ]  # as config.preprocess: image_size_px, crop_fraction, interpolation, mean, std
    class_names: tuple[str, ...]  # in the order of the head's outputs; numbers where names aren't known
    loss: str  # that it was trained with, a key of PROBABILITIES
    config: Mapping[str, Any]  # of the run, as plain data; {} for weights

    @property
    def channels(self) -> int:
        """1 or 3: of the images that the model takes."""
        return self.params["stem"]["kernel"].shape[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a model."""
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("--workdir", type=Path, help="directory of a run")
    named.add_argument(
        "--weights",
        help="published name, file or URL, as python -m mlpmixer_flax.pretrained explains",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best", "ema"),
        help="which of a run's weights (default: those that its last test accuracy is of)",
    )


def load_named(arguments: argparse.Namespace) -> Trained:
    """The model that the options of `add_arguments` name; UserError as the functions it calls."""
    if arguments.workdir is not None:
        return load_run(arguments.workdir, arguments.checkpoint)
    if arguments.checkpoint:
        raise UserError(f"--checkpoint={arguments.checkpoint} is for --workdir: weights have no checkpoints")
    return load_weights(arguments.weights)


def load_run(workdir: Path, checkpoint: str | None = None) -> Trained:
    """The model of a run; by default with the weights that its last test accuracy is of.

    `checkpoint` is as `which` of `checkpoint.read_weights`. Raises UserError where there is no run or weights.
    """
    config = read_config(workdir)
    if not config:
        raise UserError(f"no run in {workdir}: it has no config.json; --workdir is the directory of a run")
    _, params = read_weights(workdir, checkpoint or ("ema" if config["ema_decay"] else "last"))
    class_names = read_class_names(workdir)
    return Trained(
        name=str(workdir),
        model=MlpMixer(num_classes=len(class_names), **config["model"]),
        params=params,
        preprocess=config["preprocess"],
        class_names=tuple(class_names),
        loss=config["loss"],
        config=config,
    )


def load_weights(source: str) -> Trained:
    """The model of published or other weights, its sizes read off them; they are named as in `pretrained.load`.

    Raises UserError as that, or where the weights have no head.
    """
    weights = pretrained.find(source)
    sizes = sizes_of(weights.shapes)
    if "classes" not in sizes or "tokens" not in sizes:
        raise UserError(
            f"{source} has no {'head' if 'tokens' in sizes else 'Mixer blocks'}: give other weights"
        )
    origin = weights.metadata
    model = MlpMixer(
        num_classes=sizes["classes"],
        patches={"size": sizes["patches.size"]},
        **{key: sizes[key] for key in ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")},
        gelu=origin["model"]["gelu"],
    )
    area_px = sizes["tokens"] * math.prod(sizes["patches.size"])
    preprocess = {"image_size_px": math.isqrt(area_px), "crop_fraction": 0.875, **origin["preprocess"]}
    shape = (1, preprocess["image_size_px"], preprocess["image_size_px"], sizes["channels"])
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))["params"]
    return Trained(
        name=source,
        model=model,
        params=pretrained.load(source, like, head="keep"),
        preprocess=preprocess,
        class_names=tuple(origin.get("class_names") or imagenet_names(sizes["classes"])),
        loss="softmax",
        config={},
    )


def imagenet_names(num_classes: int) -> list[str]:
    """The names of ImageNet-1k's or 21k's classes by their number, those of 21k fetched; else "0", "1", ..."""
    if num_classes == 1000:
        lines = (Path(__file__).parent / "imagenet1k.txt").read_text().splitlines()
        return [line.split("\t")[1] for line in lines]
    numbers = [str(number) for number in range(num_classes)]
    if num_classes == 21843:
        try:
            names = fetch(IMAGENET21K_NAMES).read_text().splitlines()
        except UserError as error:
            print(
                f"classes are shown by number, since their names cannot be fetched: {error}", file=sys.stderr
            )
            return numbers
        return names if len(names) == num_classes else numbers
    return numbers


def make_predict(trained: Trained) -> Callable[[np.ndarray], jax.Array]:
    """A jitted function: images uint8 (n, h, w, c) -> probabilities float32 (n, classes).

    Images of any one size are resized on the device, by the test-time path of training.
    """
    preprocess = dict(trained.preprocess)

    @jax.jit
    def predict(params, images):
        logits = trained.model.apply({"params": params}, augment.prepare(images, **preprocess))
        return PROBABILITIES[trained.loss](logits)

    params = jax.device_put(trained.params)
    return lambda images: predict(params, jnp.asarray(images))
