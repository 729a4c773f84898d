"""Describes a model in a table: output shape, parameters and multiply-accumulates (MACs) per module."""

import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.optimizer import Params

Path = tuple[str, ...]  # the names from the model to one of its modules: ("MixerBlock_0", "token_mixing")
Shape = tuple[int, ...]


def summarize(
    model: MlpMixer,
    image_shape: tuple[int, int, int],
    *,
    params: Params,
    opt_state: optax.OptState | None = None,
) -> str:
    """Returns a table with a row per module, for one image, and then the totals.

    MACs are counted in convolutions and dense layers; LayerNorm, GELU and sums are left out. All Mixer blocks
    are equal, so only the first one is listed with its parts.

    Args:
      image_shape: (height, width, channels) of the model's input.
      params: a tree of arrays or jax.ShapeDtypeStruct.
      opt_state: also such a tree; None = leave out the optimizer.
    """
    rows = []
    shapes = _output_shapes(model, image_shape, params)
    leaves: dict[Path, Any] = flatten_dict(params)
    for path, shape in shapes.items():
        inside = {name: leaf for name, leaf in leaves.items() if name[: len(path)] == path}
        macs = _macs(inside, shapes)
        name, repeated = "  " * (len(path) - 1) + path[-1], re.fullmatch(r"MixerBlock_([1-9]\d*)", path[0])
        if path == ("MixerBlock_1",):
            name = f"{model.num_blocks - 1} more, each"
        elif len(path) > 2 or repeated:
            continue
        count = sum(leaf.size for leaf in inside.values())
        rows.append((name, "x".join(map(str, shape[1:])), f"{count:,}", f"{macs:,}"))
    lines = [f"{name:<32}{shape:>14}{count:>15}{macs:>18}" for name, shape, count, macs in [_HEADER, *rows]]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizer = "" if opt_state is None else f" optimizer state {_mib(opt_state):.1f} MiB,"
    lines.append(f"total: {total:,} parameters ({_mib(params):.1f} MiB),{optimizer}")
    lines.append(f"{_macs(leaves, shapes) / 1e9:.3g} GMACs per image of {'x'.join(map(str, image_shape))}")
    return "\n".join(lines)


def count_macs(model: MlpMixer, image_shape: tuple[int, int, int], params: Params) -> int:
    """Returns the multiply-accumulates of a forward pass of one image; the arguments are those of `summarize`."""
    return _macs(flatten_dict(params), _output_shapes(model, image_shape, params))


_HEADER = ("module", "output", "parameters", "MACs")


def _output_shapes(model: MlpMixer, image_shape: Shape, params: Params) -> dict[Path, Shape]:
    """Returns path -> output shape of every module with parameters, in the order of the forward pass."""
    shapes: dict[Path, Shape] = {}

    def note(call, args, kwargs, context):
        path = context.module.path
        shapes[path] = ()  # puts the module before the modules inside it
        output = call(*args, **kwargs)
        shapes[path] = output.shape
        return output

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(lambda p, x: model.clone(remat=False).apply({"params": p}, x), params, images)
    return {path: shape for path, shape in shapes.items() if path and not path[-1].startswith("Dropout")}


def _macs(leaves: dict[Path, Any], shapes: dict[Path, Shape]) -> int:
    """Returns the multiply-accumulates of the kernels among some parameters."""
    # Every output element is a dot product over all axes of the kernel except the last.
    return sum(
        math.prod(shapes[path[:-1]][1:]) * math.prod(leaf.shape[:-1])
        for path, leaf in leaves.items()
        if path[-1] == "kernel"
    )


def _mib(tree: Any) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 2**20
