"""A trained model by name, for every program that comes after training: --workdir=RUN or --weights=NAME."""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax import UserError, augment, pretrained
from mlpmixer_flax.checkpoint import read_class_names, read_run, read_weights
from mlpmixer_flax.dataloader import Examples, open_examples
from mlpmixer_flax.download import fetch
from mlpmixer_flax.fit import sizes_of
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.step import Params
from mlpmixer_flax.weightfiles import Weights

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
    preprocess: Mapping[str, Any]  # config.preprocess: image_size_px, crop_fraction, interpolation, mean, std
    class_names: tuple[str, ...]  # in the order of the head's outputs; numbers where names aren't known
    loss: str  # that it was trained with, a key of PROBABILITIES
    config: Mapping[str, Any]  # of the run, as plain data; {} for weights
    step: int | None = None  # of the run's checkpoint; None for weights

    @property
    def channels(self) -> int:
        """1 or 3: of the images that the model takes."""
        return self.params["stem"]["kernel"].shape[2]

    def logits(self, params: Params, images: jax.Array) -> jax.Array:
        """The test-time path of training, to be jitted: uint8 (n, h, w, c) -> float32 (n, classes)."""
        return self.model.apply({"params": params}, augment.prepare(images, **self.preprocess))

    def open(
        self, dataset: str, split: str, *, data_dir: str = "", skip_bad_images: bool = False
    ) -> Examples:
        """A split in grey or colour, as the model takes it, each image decoded when it is read.

        The arguments and what is raised are those of `dataloader.open_examples`.
        """
        examples = open_examples(
            dataset,
            split,
            data_dir=data_dir,
            cache_bytes=0,
            image_size_px=self.preprocess["image_size_px"],
            crop_fraction=self.preprocess["crop_fraction"],
            interpolation=self.preprocess["interpolation"],
            skip_bad_images=skip_bad_images,
        )
        return replace(examples, image_shape=(*examples.image_shape[:2], self.channels))

    def for_cropped_images(self) -> "Trained":
        """The same model, for images that the host has cropped already."""
        return replace(self, preprocess={**self.preprocess, "crop_fraction": 1.0})


def add_arguments(
    parser: argparse.ArgumentParser, *, default: str = "those that its last test accuracy is of"
) -> None:
    """The options that name a model; `default` says which weights of a run the program takes by itself."""
    add_names(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best", "ema"),
        help=f"which of a run's weights (default: {default})",
    )


def add_names(group: argparse._ArgumentGroup) -> None:
    """The two options that name a run and weights, of which a program takes one."""
    group.add_argument("--workdir", type=Path, help="directory of a run")
    group.add_argument(
        "--weights",
        help="published name, file or URL, as python -m mlpmixer_flax.pretrained explains",
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
    config = read_run(workdir)
    step, params = read_weights(workdir, checkpoint or ("ema" if config["ema_decay"] else "last"))
    class_names = read_class_names(workdir)
    return Trained(
        name=str(workdir),
        model=MlpMixer(num_classes=len(class_names), **config["model"]),
        params=params,
        preprocess=config["preprocess"],
        class_names=tuple(class_names),
        loss=config["loss"],
        config=config,
        step=step,
    )


def load_weights(source: str) -> Trained:
    """The model of published or other weights, its sizes read off them; they are named as in `pretrained.load`.

    Raises UserError as that, or where the weights have no head.
    """
    if Path(source).is_dir():
        return load_run(Path(source))
    weights = pretrained.find(source)
    model, image_shape = model_of(weights, source)
    origin = weights.metadata
    loss, class_names = origin.get("loss", "softmax"), origin.get("class_names", ())
    if loss not in PROBABILITIES or len(class_names) not in (0, model.num_classes):
        raise UserError(
            f"what {source} says of itself does not go together (loss {loss!r}, {len(class_names)} names of "
            f"{model.num_classes} classes): write the file again"
        )
    if not class_names:  # a file of ours that could not hold them says how many there are
        numbered = "num_classes" in origin
        class_names = _numbers(model.num_classes) if numbered else imagenet_names(model.num_classes)
    preprocess = {"image_size_px": image_shape[0], "crop_fraction": 0.875, **origin["preprocess"]}
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
    return Trained(
        name=source,
        model=model,
        params=pretrained.load(source, like, head="keep"),
        preprocess=preprocess,
        class_names=tuple(class_names),
        loss=loss,
        config={},
    )


def model_of(weights: Weights, name: str) -> tuple[MlpMixer, tuple[int, int, int]]:
    """The model of weights and the (height, width, channels) of its images, read off the shapes of the weights.

    Raises UserError, with the name, where they have no head or are of no Mixer.
    """
    sizes = sizes_of(weights.shapes)
    if "classes" not in sizes or "tokens" not in sizes:
        raise UserError(
            f"{name} has no {'head' if 'tokens' in sizes else 'Mixer blocks'}: give other weights"
        )
    model = MlpMixer(
        num_classes=sizes["classes"],
        patches={"size": sizes["patches.size"]},
        **{key: sizes[key] for key in ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")},
        **{key: value for key, value in weights.metadata["model"].items() if key in ("gelu", "dtype")},
    )
    area_px = sizes["tokens"] * math.prod(sizes["patches.size"])
    side_px = weights.metadata["preprocess"].get("image_size_px", math.isqrt(area_px))
    return model, (side_px, side_px, sizes["channels"])


def in_words(class_names: Sequence[str]) -> list[str]:
    """Names of classes; of WordNet numbers, by which datasets name ImageNet-1k's ("n01440764"), the words."""
    words = dict(_imagenet1k())
    return [words.get(name, name) for name in class_names]


def _imagenet1k() -> list[tuple[str, str]]:
    """(WordNet number, words) of the classes, in the order of a model's outputs; no two have the same words."""
    lines = (Path(__file__).parent / "imagenet1k.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    times = Counter(words for _, words in rows)  # a crane is a bird and a machine
    return [(number, words if times[words] == 1 else f"{words} ({number})") for number, words in rows]


def _numbers(num_classes: int) -> list[str]:
    return [str(number) for number in range(num_classes)]


def imagenet_names(num_classes: int) -> list[str]:
    """The names of ImageNet-1k's or 21k's classes by their number, those of 21k fetched; else "0", "1", ..."""
    if num_classes == 1000:
        return [words for _, words in _imagenet1k()]
    if num_classes == 21843:
        try:
            names = fetch(IMAGENET21K_NAMES).read_text(encoding="utf-8").splitlines()
        except UserError as error:
            print(
                f"classes are shown by number, since their names cannot be fetched: {error}", file=sys.stderr
            )
            names = []
        if len(names) == num_classes:
            return names
    return _numbers(num_classes)


def make_predict(trained: Trained) -> Callable[[np.ndarray], jax.Array]:
    """A jitted function: images uint8 (n, h, w, c) -> probabilities float32 (n, classes).

    Images of any one size are resized on the device, by the test-time path of training.
    """

    @jax.jit
    def predict(params, images):
        return PROBABILITIES[trained.loss](trained.logits(params, images))

    params = jax.device_put(trained.params)
    return lambda images: predict(params, jnp.asarray(images))
