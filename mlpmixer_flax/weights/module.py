"""Finds the Linen module that weights belong to, and the shapes of its parameters."""

import math

import jax
import jax.numpy as jnp

from mlpmixer_flax import UserError
from mlpmixer_flax.limits import check_limits, show
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.adapt import Params, sizes_of
from mlpmixer_flax.weights.files import Weights


def module_of(weights: Weights, name: str) -> tuple[MlpMixer, tuple[int, int, int]]:
    """Returns the Linen module of weights and the (height, width, channels) of its images, from array shapes.

    Raises:
      UserError: the weights have no head, or are not those of a Mixer; the message contains `name`.
    """
    sizes = sizes_of(weights.shapes)
    if "classes" not in sizes or "tokens" not in sizes:
        raise UserError(
            f"{name} has no {'head' if 'tokens' in sizes else 'Mixer blocks'}: give other weights"
        )
    for key in ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim"):
        if key not in sizes:
            raise UserError(f"{name} has no arrays that tell model.{key}: give other weights")
        check_limits(f"model.{key}", sizes[key])
    module = MlpMixer(
        num_classes=sizes["classes"],
        patches={"size": sizes["patches.size"]},
        **{key: sizes[key] for key in ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")},
        **{key: value for key, value in weights.metadata["model"].items() if key in ("gelu", "dtype")},
    )
    area_px = sizes["tokens"] * math.prod(sizes["patches.size"])
    side_px = weights.metadata["preprocess"].get("image_size_px", math.isqrt(area_px))
    if not isinstance(side_px, int) or side_px * side_px != area_px:
        raise UserError(
            f"the metadata of {name} has preprocess.image_size_px={show(side_px)}, but its arrays are for images of "
            f"{area_px:,} pixels: write the file again"
        )
    check_limits("preprocess.image_size_px", side_px)
    return module, (side_px, side_px, sizes["channels"])


def shapes_of(module: MlpMixer, image_shape: tuple[int, int, int]) -> Params:
    """Returns the parameters of a module as jax.ShapeDtypeStruct, for images (height, width, channels)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # All blocks have the same shapes, and tracing a thousand of them takes seconds.
    shapes = jax.eval_shape(module.clone(num_blocks=1).init, jax.random.key(0), images)["params"]
    return {**shapes, **{f"MixerBlock_{i}": shapes["MixerBlock_0"] for i in range(module.num_blocks)}}
