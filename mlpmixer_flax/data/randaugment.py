"""Applies RandAugment (Cubuk et al. 2019, arXiv 1909.13719) to a whole batch on the device.

Choosing one of fifteen functions per image (`lax.switch` under `vmap`) would compute all fifteen for every
image. Here an op only computes parameters for each image, in one of three forms, and a layer applies them in
at most three passes over the batch: a warp by an affine matrix, a lookup table of 256 entries per channel,
and a blend with a degenerate image.

The strength is a magnitude m from 0 to 30; 0 changes nothing. Ops without an upper limit use the scale of the
TensorFlow code that trained the published Mixers (its level 10 is our 10): rotate by 3 m degrees, shear by
0.03 m, translate by 0.045 m of the side (100 of 224 px at 10), and solarize_add adds 11 m levels. The
enhancing ops (color, contrast, brightness, sharpness) blend by 1 + 0.09 m or, half the time, by 1 - 0.09 m,
at least 0.1. In that code posterize and solarize get weaker as the level grows; here they get stronger, up to
their strongest useful setting at 30: posterize drops 4 m / 30 bits, and solarize inverts levels from
256 (1 - m / 30) up. auto_contrast, equalize and invert have no magnitude. Pixels are rounded as in Pillow.
"""

import difflib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mlpmixer_flax import UserError

_FILL = 128  # gray, for pixels that a warp takes from outside the image
_LEVELS = np.arange(256, dtype=np.int32)


def randaugment(
    key: jax.Array, images: jax.Array, *, layers: int, ops: Sequence[str], magnitude: float
) -> jax.Array:
    """Applies `layers` ops, one after another, to each image of uint8 (n, h, w, c).

    For each image and layer, an op of `ops` and the sign of `magnitude` are drawn with equal chances.

    Raises:
      UserError: as `check_ops`.
    """
    check_ops(ops)
    for layer_key in jax.random.split(key, layers):
        op_key, sign_key = jax.random.split(layer_key)
        drawn = jax.random.randint(op_key, images.shape[:1], 0, len(ops))
        sign = jax.random.rademacher(sign_key, images.shape[:1], jnp.float32)
        images = apply_ops(images, drawn, magnitude=sign * magnitude, ops=ops)
    return images


def check_ops(ops: Sequence[str]) -> None:
    """Checks the names of the ops in `config.augment.randaugment_ops`.

    Raises:
      UserError: there are no names, or a name is unknown.
    """
    names = [op for _, kind in _PASSES for op in kind]
    if not ops:
        raise UserError(
            f"augment.randaugment_ops is empty: name at least one of {', '.join(names)}, or set "
            "augment.randaugment_layers to 0"
        )
    for op in ops:
        if op not in names:
            nearest = difflib.get_close_matches(op, names, n=1, cutoff=0)[0]
            raise UserError(f"augment.randaugment_ops has an unknown op {op!r}: did you mean {nearest!r}?")


def apply_ops(images: jax.Array, drawn: jax.Array, *, magnitude: jax.Array, ops: Sequence[str]) -> jax.Array:
    """Applies one layer to uint8 images (n, h, w, c).

    Each image gets op number `drawn` (n,) of `ops`, at the signed `magnitude` (n,).
    """
    magnitude = magnitude[:, None, None, None]
    # Every pass reads `images`, not `result`: an image draws one op, so no pass needs the result of another.
    result = images
    for apply, kind in _PASSES:
        chosen, parameters = jnp.zeros_like(magnitude, bool), None
        for i, op in enumerate(ops):
            if op in kind:
                mask = (drawn == i)[:, None, None, None]
                own = kind[op](images, magnitude)
                parameters = own if parameters is None else jnp.where(mask, own, parameters)
                chosen |= mask
        if parameters is not None:
            result = _pass(apply, images, parameters, chosen, result)
    return result


def _pass(
    apply: Callable, images: jax.Array, parameters: jax.Array, chosen: jax.Array, result: jax.Array
) -> jax.Array:
    # The branch skips a pass that no image drew. It also stops XLA from fusing operations across it: if
    # fused, each pixel would compute the table entry that it looks up, and each use of a pixel would compute
    # that pixel again, which is 3 times as slow on a CPU.
    return jax.lax.cond(
        chosen.any(), lambda: jnp.where(chosen, apply(images, parameters), result), lambda: result
    )


def warp(images: jax.Array, matrix: jax.Array) -> jax.Array:
    """Warps images (n, h, w, c) by matrices (n, 1, 1, 6), like Pillow's AFFINE.

    Output pixel (x, y) is the input pixel nearest to (a x + b y + c, d x + e y + f), or gray (128) outside
    the image. Pixel centres are at halves.
    """
    n, h, w, c = images.shape
    x, y = np.arange(w, dtype=np.float32) + 0.5, np.arange(h, dtype=np.float32)[:, None] + 0.5
    from_x = jnp.floor(matrix[..., 0] * x + matrix[..., 1] * y + matrix[..., 2]).astype(jnp.int32)
    from_y = jnp.floor(matrix[..., 3] * x + matrix[..., 4] * y + matrix[..., 5]).astype(jnp.int32)
    inside = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
    index = jnp.where(inside, from_y * w + from_x, 0).reshape(n, h * w, 1)
    moved = jnp.take_along_axis(images.reshape(n, h * w, c), index, axis=1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], moved.reshape(images.shape), np.uint8(_FILL))


def look_up(images: jax.Array, table: jax.Array) -> jax.Array:
    """Replaces each level of uint8 images (n, h, w, c) by its entry in the tables (n, c or 1, 1, 256)."""
    n, h, w, c = images.shape
    table = jnp.broadcast_to(table, (n, c, 1, 256)).reshape(n, c, 256).swapaxes(1, 2).astype(jnp.uint8)
    index = images.reshape(n, h * w, c).astype(jnp.int32)
    return jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds").reshape(images.shape)


def _affine(
    *,
    a: ArrayLike = 1.0,
    b: ArrayLike = 0.0,
    c: ArrayLike = 0.0,
    d: ArrayLike = 0.0,
    e: ArrayLike = 1.0,
    f: ArrayLike = 0.0,
) -> jax.Array:
    """Returns matrices (n, 1, 1, 6) from their coefficients; each is a number or (n, 1, 1, 1)."""
    return jnp.concatenate(jnp.broadcast_arrays(a, b, c, d, e, f), axis=-1)


def _rotate(images: jax.Array, m: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(jnp.radians(3 * m)), jnp.sin(jnp.radians(3 * m))
    y, x = images.shape[1] / 2, images.shape[2] / 2  # the centre does not move
    return _affine(a=cos, b=sin, c=x - x * cos - y * sin, d=-sin, e=cos, f=y + x * sin - y * cos)


def _auto_contrast(images: jax.Array, m: jax.Array) -> jax.Array:
    pixels = images.astype(jnp.int32)
    low, high = (extreme((1, 2))[:, :, None, None] for extreme in (pixels.min, pixels.max))
    stretched = (_LEVELS - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(low == high, _LEVELS, jnp.clip(stretched, 0, 255))


def _equalize(images: jax.Array, m: jax.Array) -> jax.Array:
    n, h, w, c = images.shape
    bins = images.reshape(n, h * w, c).astype(jnp.int32) + 256 * np.arange(c)
    # One scatter per image is many times as fast on a CPU as comparing every pixel with every level.
    histogram = jax.vmap(lambda bins: jnp.zeros(c * 256, jnp.int32).at[bins].add(1))(bins)
    histogram = histogram.reshape(n, c, 1, 256)
    below = jnp.cumsum(histogram, axis=-1) - histogram
    step = (
        jnp.where(histogram > 0, below, 0).max(-1, keepdims=True) // 255
    )  # the brightest bin is not counted
    return jnp.where(step == 0, _LEVELS, jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255))


def _posterize(images: jax.Array, m: jax.Array) -> jax.Array:
    bits = jnp.round(jnp.abs(m) * 4 / 30).astype(jnp.int32)
    return jnp.asarray(_LEVELS) >> bits << bits


def _solarize(images: jax.Array, m: jax.Array) -> jax.Array:
    return jnp.where(_LEVELS < 256 * (1 - jnp.abs(m) / 30), _LEVELS, 255 - _LEVELS)


def _solarize_add(images: jax.Array, m: jax.Array) -> jax.Array:
    added = jnp.minimum(_LEVELS + (11 * jnp.abs(m)).astype(jnp.int32), 255)
    return jnp.where(_LEVELS < 128, added, _LEVELS)


def _contrast(images: jax.Array, m: jax.Array) -> jax.Array:
    pixels = images.shape[1] * images.shape[2]
    mean = (_gray(images).sum((1, 2, 3), keepdims=True) + pixels // 2) // pixels
    return _enhance(mean, _LEVELS, m)


def _enhance(degenerate: jax.Array | int, levels: jax.Array | np.ndarray, m: jax.Array) -> jax.Array:
    """Moves levels away from a degenerate image (m > 0) or towards it (m < 0), like Pillow's ImageEnhance."""
    factor = jnp.maximum(1 + 0.09 * m, 0.1)
    exact = degenerate + factor * (levels - degenerate)
    # The cast truncates, as in Pillow. The small number keeps a device's rounding from pushing a whole number
    # below itself.
    return jnp.clip(exact + 1e-3, 0, 255).astype(jnp.uint8)


def _gray(images: jax.Array) -> jax.Array:
    """Returns int32 (n, h, w, 1): luma of three channels (ITU-R 601, as in Pillow), else their mean."""
    c = images.shape[-1]
    if c == 3:
        weighted = images.astype(jnp.int32) * np.array([19595, 38470, 7471], np.int32)
        return (weighted.sum(-1, keepdims=True) + 2**15) >> 16
    return (images.sum(-1, keepdims=True, dtype=jnp.int32) + c // 2) // c


def _color(images: jax.Array, m: jax.Array) -> jax.Array:
    return _enhance(_gray(images), images, m) if images.shape[-1] == 3 else images


def _sharpness(images: jax.Array, m: jax.Array) -> jax.Array:
    """Blends with a 3x3 mean in which the centre counts five times; the border is unchanged."""
    x = images.astype(jnp.int32)
    box = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    box = box[:, :, :-2] + box[:, :, 1:-1] + box[:, :, 2:]
    smooth = x.at[:, 1:-1, 1:-1].set((2 * (box + 4 * x[:, 1:-1, 1:-1]) + 13) // 26)
    return _enhance(smooth, x, m)


# Each pass and its ops. An op maps images (n, h, w, c) and signed magnitudes (n, 1, 1, 1) to the pass's
# parameters. The names are those of config.RANDAUGMENT_OPS.
_PASSES = (
    (
        warp,
        {
            "rotate": _rotate,
            "shear_x": lambda images, m: _affine(b=0.03 * m),
            "shear_y": lambda images, m: _affine(d=0.03 * m),
            "translate_x": lambda images, m: _affine(c=0.045 * m * images.shape[2]),
            "translate_y": lambda images, m: _affine(f=0.045 * m * images.shape[1]),
        },
    ),
    (
        look_up,
        {
            "auto_contrast": _auto_contrast,
            "equalize": _equalize,
            "invert": lambda images, m: 255 - _LEVELS,
            "posterize": _posterize,
            "solarize": _solarize,
            "solarize_add": _solarize_add,
            "brightness": lambda images, m: _enhance(0, _LEVELS, m),
            "contrast": _contrast,
        },
    ),
    (lambda images, blended: blended, {"color": _color, "sharpness": _sharpness}),
)
