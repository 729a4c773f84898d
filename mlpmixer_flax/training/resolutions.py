"""Trains one model for several resolutions: each update has images of one size, and adapts the token mixing to it."""

import textwrap
from collections.abc import Mapping
from typing import Any, cast

import jax
import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.models import MlpMixer, check_patch
from mlpmixer_flax.run_weights import split_size
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.weights.tokens import grid_of, resampled, with_tokens

MAX_SIZES = 16


def sizes_of(config: ConfigDict) -> tuple[int, ...]:
    """Returns the sides of the images that the model is trained with, in pixels, the model's own size first."""
    own = config.preprocess.image_size_px
    return own, *sorted(size_px for size_px in config.resolutions_px if size_px != own)


def check_resolutions(config: ConfigDict) -> None:
    """Checks that a model of this config can be trained with images of all sizes of config.resolutions_px.

    Raises:
      UserError: it cannot.
    """
    sizes, own, patch = config.resolutions_px, config.preprocess.image_size_px, config.model.patches["size"]
    if not sizes:
        return
    if len(sizes) > MAX_SIZES:
        raise UserError(
            f"resolutions_px has {len(sizes):,} sizes, and each has a program of its own: give at most {MAX_SIZES}"
        )
    if twice := [size_px for size_px in sizes if sizes.count(size_px) > 1]:
        raise UserError(f"resolutions_px={sizes} has {twice[0]} twice: give each size once")
    if own not in sizes:
        raise UserError(
            f"resolutions_px={sizes} lacks preprocess.image_size_px={own}, the size of the weights that are stored: add "
            f"{own}, or set preprocess.image_size_px to one of the sizes"
        )
    if odd := [size_px for size_px in sizes if size_px % patch[0] or size_px % patch[1]]:
        raise UserError(
            f"resolutions_px={sizes} has {odd[0]}, which patches of {patch[0]}x{patch[1]} px do not divide: give "
            "multiples of the patch"
        )
    check_patch(patch, (max(sizes), max(sizes)), change="resolutions_px or model.patches.size")


def size_of_update(config: ConfigDict, step: int) -> int:
    """Returns the side in pixels of the images of the update that follows `step`, a pure function of seed and step.

    The sizes are shuffled like cards: each n updates from step 0, n or 2 n use each of the n sizes once, in a new order.
    So all sizes have the same number of updates, and n updates always take about the same time.
    """
    sizes = sizes_of(config)
    deck, card = divmod(step, len(sizes))
    # 0 and 1 at this place are the keys of the order of the images and of their crops, see `dataloader`.
    return sizes[np.random.default_rng((config.seed, 2, deck)).permutation(len(sizes))[card]]


def models_by_size(model: MlpMixer, config: ConfigDict) -> dict[int, "MlpMixer | ResizedMixer"]:
    """Returns the model for each of its sizes, by the side in pixels, its own size first.

    All take images of the model's own size and its own parameters. At its own size it is the model itself.
    """
    own, *others = sizes_of(config)
    interpolation = config.preprocess.interpolation
    return {own: model} | {
        size_px: ResizedMixer(model, own, size_px, interpolation=interpolation) for size_px in others
    }


class ResizedMixer:
    """A Mixer that resizes its images to another size, and resamples its token-mixing weights to the tokens of this size.

    Both are done inside `apply`, so gradients are those of the weights of the own size. Parameters are adapted as those
    of a file, by `weights.tokens.resampled`.
    """

    def __init__(self, model: MlpMixer, own_px: int, size_px: int, *, interpolation: str):
        self.num_classes = model.num_classes
        self._model, self._size_px, self._interpolation = model, size_px, interpolation
        # Made here and not while `apply` is traced, so that they are constants of the compiled program.
        self._transforms = resampled(grid_of(model, own_px), grid_of(model, size_px))

    def apply(self, variables: Mapping[str, Params], images: jax.Array, **options: Any) -> jax.Array:
        """Returns the logits of images float32 (n, own size, own size, c); arguments are those of `MlpMixer.apply`."""
        n, _, _, channels = images.shape
        images = jax.image.resize(images, (n, self._size_px, self._size_px, channels), self._interpolation)
        with jax.default_matmul_precision("highest"):  # GPUs and TPUs round the factors otherwise
            params = with_tokens(variables["params"], self._transforms)
        return cast(jax.Array, self._model.apply({"params": params}, images, **options))


def split_sizes(scores: Mapping[str, float], *, best_by: str) -> tuple[dict[str, float], str]:
    """Returns the scores of the model's own size, and text about the others: "  accuracy at 16 px 0.5412, 24 px 0.5302".

    The text has the score of config.best_by.
    """
    own, others = {}, []
    for key, score in scores.items():
        name, size_px = split_size(key)
        if not size_px:
            own[key] = score
        elif name.endswith(f"/{best_by}"):
            others.append(f"{size_px} px {score:.4f}")
    text = f"{best_by.replace('_', ' ')} at {', '.join(others)}"
    return own, textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="    ") if others else ""
