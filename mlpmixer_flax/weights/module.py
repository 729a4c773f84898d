"""Finds the Linen module that weights belong to, and the shapes of its parameters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.data.images import MODES
from mlpmixer_flax.limits import check_limits, show
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.text import listed
from mlpmixer_flax.weights.adapt import Params, Shapes, sizes_of
from mlpmixer_flax.weights.files import Weights

_DIMENSIONS = ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")


def module_of(weights: Weights, name: str) -> tuple[MlpMixer, tuple[int, int, int]]:
    """Returns the Linen module of weights and the (height, width, channels) of its images, from array shapes.

    Raises:
      UserError: the weights have no head, or are not those of a Mixer; the message contains `name`.
    """
    sizes = sizes_of(weights.shapes)
    if "tokens" not in sizes:
        raise UserError(f"{name} has no Mixer blocks: give other weights")
    if "classes" not in sizes:
        raise UserError(
            f"{name} has no head: give weights with a head, or train one that starts from these (--config.init_from)"
        )
    for key in _DIMENSIONS:
        if key not in sizes:
            raise UserError(f"{name} has no arrays that tell model.{key}: give other weights")
        check_limits(f"model.{key}", sizes[key])
    module = MlpMixer(
        num_classes=sizes["classes"],
        patches={"size": sizes["patches.size"]},
        **{key: sizes[key] for key in _DIMENSIONS},
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


def check_shapes(config: Mapping[str, Any], class_names: Sequence[str], shapes: Shapes, *, name: str) -> None:
    """Checks that the weights of a run have the shapes that its config and class names say.

    Otherwise a file was probably copied from another run.

    Args:
      config: as plain data, which may be damaged.
      shapes: of the weights, by name.
      name: of the run, for the message.

    Raises:
      UserError: they have others.
    """
    stated: dict[str, Any] = flatten_dict(dict(config), sep=".")
    sizes = sizes_of(shapes)
    found = {f"model.{key}": sizes.get(key) for key in _DIMENSIONS}
    found["model.patches.size"] = [*sizes.get("patches.size", ())]
    wrong = [key for key, value in found.items() if stated.get(key) != value]
    wrong += ["classes"] * (sizes.get("classes") != len(class_names))
    wrong += ["channels"] * (sizes.get("channels") not in MODES)
    side_px: Any = stated.get("preprocess.image_size_px")
    wrong += ["preprocess.image_size_px"] * (type(side_px) is not int)
    if not wrong:  # only then, because a damaged config may state any number of blocks
        module = MlpMixer(
            num_classes=len(class_names), **{key: config["model"][key] for key in ("patches", *_DIMENSIONS)}
        )
        like: dict[str, Any] = flatten_dict(shapes_of(module, (side_px, side_px, sizes["channels"])), sep="/")
        wanted = {key: leaf.shape for key, leaf in like.items()}
        wrong = [key for key in {**wanted, **shapes} if wanted.get(key) != shapes.get(key)]
    if wrong:
        raise UserError(
            f"{name} contradicts itself: config.json and class_names.json are of another model than the weights "
            f"({listed(wrong, 3)}): restore the files, or choose another run"
        )


def shapes_of(module: MlpMixer, image_shape: tuple[int, int, int]) -> Params:
    """Returns the parameters of a module as jax.ShapeDtypeStruct, for images (height, width, channels)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # All blocks have the same shapes, and tracing a thousand of them takes seconds.
    shapes = jax.eval_shape(module.clone(num_blocks=1).init, jax.random.key(0), images)["params"]
    return {**shapes, **{f"MixerBlock_{i}": shapes["MixerBlock_0"] for i in range(module.num_blocks)}}
