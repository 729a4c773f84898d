"""Changes token-mixing weights to another grid of tokens: exactly for tiles, approximately for any grid."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mlpmixer_flax.models import MlpMixer

Grid = tuple[int, int]  # rows and columns of tokens
Transform = Callable[[Any], Any]  # from a numpy array to another; those of `resampled` also take JAX arrays


def grid_of(model: MlpMixer, size_px: int) -> Grid:
    """Returns the tokens of a model for square images of this side."""
    height, width = model.patches["size"]
    return size_px // height, size_px // width


def tiled(source: Grid, tiles: Grid) -> dict[str, Transform]:
    """Returns the transforms for a larger image that is mixed tile by tile (paper, Appendix C).

    Kernels become block-diagonal, with one block per tile. The features of an image are then the mean of the
    features of its tiles.

    Args:
      source: the tokens of the weights, which are the tokens of one tile.
      tiles: rows and columns of tiles in the larger image.

    Returns:
      Parameter of the token-mixing MLP ("Dense_0/kernel") -> its transform; all four parameters change.
    """
    tokens = np.arange(math.prod(tiles) * math.prod(source)).reshape(*tiles, *source)
    raster = tokens.swapaxes(1, 2).ravel()  # the blocks are ordered tile by tile, the tokens row by row
    diagonal = np.eye(math.prod(tiles), dtype=np.float32)
    return {
        "Dense_0/kernel": lambda kernel: np.kron(diagonal, kernel)[raster],
        "Dense_0/bias": lambda bias: np.tile(bias, len(diagonal)),
        "Dense_1/kernel": lambda kernel: np.kron(diagonal, kernel)[:, raster],
        "Dense_1/bias": lambda bias: np.tile(bias, len(diagonal))[raster],
    }


def resampled(source: Grid, target: Grid) -> dict[str, Transform]:
    """Returns the transforms that resize tokens to the old grid, mix them as before, and resize them back.

    Both resizes are bicubic, and antialiased when they shrink. They are linear, so they become part of the
    kernels. If all tokens are equal, the hidden activations stay the same, whatever the number of tokens.

    Args:
      source: the tokens of the weights.
      target: the tokens of the model.

    Returns:
      Parameter of the token-mixing MLP -> its transform; "Dense_0/bias" stays as it is.
    """
    # On a CIFAR-10 run with 8x8 tokens, changed to 6x6 to 16x16 tokens and not trained further, bilinear came
    # within one point of this accuracy; the pseudo-inverse of `back` in place of `there` (arXiv 2212.08013)
    # lost 1 to 3 points.
    there, back = _resize(target, source), _resize(source, target)
    return {
        "Dense_0/kernel": lambda kernel: there.T @ kernel,
        "Dense_1/kernel": lambda kernel: kernel @ back.T,
        "Dense_1/bias": lambda bias: back @ bias,
    }


def with_tokens(params: Mapping[str, Any], transforms: Mapping[str, Transform]) -> dict[str, Any]:
    """Returns parameters of a Mixer whose token-mixing MLPs are transformed, in all blocks.

    It is linear in the parameters, and may be traced and differentiated, if the transforms are those of `resampled`.

    Args:
      params: a tree of numpy or JAX arrays.
      transforms: as `resampled` and `tiled` return them.
    """
    flat = flatten_dict(dict(params), sep="/")
    for name in flat:
        _, _, parameter = name.partition("/token_mixing/")
        if parameter in transforms:
            flat[name] = transforms[parameter](flat[name])
    return unflatten_dict(flat, sep="/")


def _resize(old: Grid, new: Grid) -> np.ndarray:
    """Returns the matrix (new tokens, old tokens) that resizes a grid."""
    rows, columns = (
        jax.image.resize(np.eye(n, dtype=np.float32), (m, n), "bicubic")
        for n, m in zip(old, new, strict=True)
    )
    return np.kron(rows, columns)
