"""Applies RandAugment (Cubuk et al. 2019, arXiv 1909.13719) to a whole batch on the device.

Choosing one of fifteen functions per image (`lax.switch` under `vmap`) would compute all fifteen for every
image. Here an op belongs to one of three kinds, and a layer is at most three passes over the batch: pixels move,
as a map from pixel to pixel says; levels are replaced by a lookup table of 256 entries per channel; or the image
is blended with a degenerate image. `lookups.py` has the first two.

The strength is a magnitude m from 0 to 30; 0 changes nothing. Ops without an upper limit use the scale of the
TensorFlow code that trained the published Mixers (its level 10 is our 10): rotate by 3 m degrees, shear by
0.03 m, translate by 0.045 m of the side (100 of 224 px at 10), and solarize_add adds 11 m levels. The
enhancing ops (color, contrast, brightness, sharpness) blend by 1 + 0.09 m or, half the time, by 1 - 0.09 m,
at least 0.1. In that code posterize and solarize get weaker as the level grows; here they get stronger, up to
their strongest useful setting at 30: posterize drops 4 m / 30 bits, and solarize inverts levels from
256 (1 - m / 30) up. auto_contrast, equalize and invert have no magnitude. Pixels are rounded as in Pillow.
"""

import difflib
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.data import lookups
from mlpmixer_flax.limits import show

_LEVELS = np.arange(256, dtype=np.int32)
_MOST_OPS = 100  # one may be given several times, to be drawn more often


def randaugment(
    key: jax.Array, images: jax.Array, *, layers: int, ops: Sequence[str], magnitude: float
) -> jax.Array:
    """Applies `layers` ops, one after another, to each image of uint8 (n, h, w, c).

    For each image and layer, an op of `ops` and the sign of `magnitude` are drawn with equal chances.

    Raises:
      UserError: as `check_ops`.
    """
    check_ops(ops)

    def layer(images: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        op_key, sign_key = jax.random.split(key)
        drawn = jax.random.randint(op_key, images.shape[:1], 0, len(ops))
        sign = jax.random.rademacher(sign_key, images.shape[:1], jnp.float32)
        return apply_ops(images, drawn, sign, magnitude=magnitude, ops=ops), None

    # A loop, so that the compiler sees one layer: two of them take it more than twice as long.
    return jax.lax.scan(layer, images, jax.random.split(key, layers))[0]


def check_ops(ops: Sequence[str]) -> None:
    """Checks the names of the ops in `config.augment.randaugment_ops`.

    Raises:
      UserError: there are no names or too many, or a name is unknown.
    """
    names = [op for _, kind in _PASSES for op in kind]
    if not ops:
        raise UserError(
            f"augment.randaugment_ops is empty: name at least one of {', '.join(names)}, or set "
            "augment.randaugment_layers to 0"
        )
    if len(ops) > _MOST_OPS:
        raise UserError(
            f"augment.randaugment_ops has {len(ops):,} ops, which take minutes to compile: give at most {_MOST_OPS}"
        )
    for op in ops:
        if op not in names:
            nearest = difflib.get_close_matches(op, names, n=1, cutoff=0)[0]
            raise UserError(
                f"augment.randaugment_ops has an unknown op {show(op)}: did you mean {nearest!r}?"
            )


def apply_ops(
    images: jax.Array, drawn: jax.Array, sign: jax.Array, *, magnitude: float, ops: Sequence[str]
) -> jax.Array:
    """Applies one layer to uint8 images (n, h, w, c).

    Each image gets op number `drawn` (n,) of `ops`, at `magnitude` with its `sign` (n,), 1 or -1.
    """
    # Every pass reads `images`, not `result`: an image draws one op, so no pass needs the result of another.
    result = images
    for make_pass, kind in _PASSES:
        numbers = [number for number, op in enumerate(ops) if op in kind]
        if numbers:
            functions = [kind[ops[number]] for number in numbers]
            which = jnp.full_like(drawn, -1)  # the position in `functions`, or -1
            for position, number in enumerate(numbers):
                which = jnp.where(drawn == number, position, which)
            apply = make_pass(images, functions, which, sign, magnitude)
            result = _where_drawn((which >= 0)[:, None, None, None], apply, result)
    return result


def _where_drawn(chosen: jax.Array, apply: Callable[[], jax.Array], result: jax.Array) -> jax.Array:
    # The branch skips a pass that no image drew. It also stops XLA from fusing operations across it: if
    # fused, each pixel would compute the table entry that it looks up, and each use of a pixel would compute
    # that pixel again, which is 3 times as slow on a CPU. A TPU looks nothing up, and fusing makes it faster.
    def select():
        return jnp.where(chosen, apply(), result)

    return jax.lax.platform_dependent(
        default=lambda: jax.lax.cond(chosen.any(), select, lambda: result), tpu=select
    )


def _warps(images, functions, which, sign, magnitude):
    h, w = images.shape[1:3]
    signed = (magnitude, -magnitude)
    sources = [_source(function(m, h, w), h, w) for function in functions for m in signed]
    drawn = jnp.where(which < 0, -1, 2 * which + (sign < 0))
    return lambda: lookups.warp(images, drawn, sources)


def _replacements(images, functions, which, sign, magnitude):
    m = (sign * magnitude)[:, None, None]
    table = _own([function(images, m) for function in functions], which[:, None, None])
    return lambda: lookups.look_up(images, table)


def _blends(images, functions, which, sign, magnitude):
    m = (sign * magnitude)[:, None, None, None]
    blended = _own([function(images, m) for function in functions], which[:, None, None, None])
    return lambda: blended


def _own(candidates: Sequence[jax.Array], which: jax.Array) -> jax.Array:
    """Returns for each image its row of the candidate that it drew; `which` broadcasts with the candidates."""
    own = candidates[0]
    for i, candidate in enumerate(candidates[1:], start=1):
        own = jnp.where(which == i, candidate, own)
    return own


def _source(matrix: tuple[float, ...], h: int, w: int) -> lookups.PixelMap:
    """Returns the source of each pixel of an image (h, w) that is warped by a matrix, like Pillow's AFFINE.

    Pixel (x, y) comes from the pixel nearest to (a x + b y + c, d x + e y + f). Pixel centres are at halves.
    """
    a, b, c, d, e, f = matrix
    y, x = np.ogrid[:h, :w]

    def fixed_point(number: float) -> int:  # 16 bits after the point, as in Pillow
        return math.floor(number * 2**16 + 0.5)

    def floor(of_x: float, of_y: float, offset: float) -> np.ndarray:
        at_centre = fixed_point(offset + of_x * 0.5 + of_y * 0.5)
        return (fixed_point(of_x) * x + fixed_point(of_y) * y + at_centre) >> 16

    column, row = floor(a, b, c), floor(d, e, f)
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    return lookups.PixelMap(np.where(inside, row, -1), np.where(inside, column, -1))


def _rotate(m: float, h: int, w: int) -> tuple[float, ...]:
    # Rounded as in Pillow, so that the cosine and the sine of 45 degrees are equal.
    cos, sin = round(math.cos(math.radians(3 * m)), 15), round(math.sin(math.radians(3 * m)), 15)
    y, x = h / 2, w / 2  # the centre does not move
    return cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos


def _auto_contrast(images: jax.Array, m: jax.Array) -> jax.Array:
    pixels = images.astype(jnp.int32)
    low, high = (extreme((1, 2))[:, :, None] for extreme in (pixels.min, pixels.max))
    stretched = (_LEVELS - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(low == high, _LEVELS, jnp.clip(stretched, 0, 255))


def _equalize(images: jax.Array, m: jax.Array) -> jax.Array:
    counts = lookups.count_levels(images)
    below = jnp.cumsum(counts, axis=-1) - counts
    step = jnp.where(counts > 0, below, 0).max(-1, keepdims=True) // 255  # the brightest level is not counted
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
    mean = (_gray(images).sum((1, 2)) + pixels // 2) // pixels
    return _enhance(mean[..., None], _LEVELS, m)


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
    h, w = images.shape[1:3]
    y, x = np.ogrid[:h, :w]
    inside = ((y > 0) & (y < h - 1) & (x > 0) & (x < w - 1))[..., None]
    levels = images.astype(jnp.int32)
    # Slices of uint8, so that the whole op becomes one loop over the pixels.
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    box = sum(padded[:, i : h + i, j : w + j].astype(jnp.int32) for i in range(3) for j in range(3))
    smooth = (2 * (box + 4 * levels) + 13) * 10083 >> 18  # divided by 26: exact up to 26 * 255 + 13
    return _enhance(jnp.where(inside, smooth, levels), levels, m)


# Each pass and its ops; the names are those of config.RANDAUGMENT_OPS. A warp maps the signed magnitude, height and
# width to a matrix. The others map images (n, h, w, c) and signed magnitudes, as (n, 1, 1) to tables (n, c or 1, 256), and
# as (n, 1, 1, 1) to images.
_PASSES = (
    (
        _warps,
        {
            "rotate": _rotate,
            "shear_x": lambda m, h, w: (1, 0.03 * m, 0, 0, 1, 0),
            "shear_y": lambda m, h, w: (1, 0, 0, 0.03 * m, 1, 0),
            "translate_x": lambda m, h, w: (1, 0, 0.045 * m * w, 0, 1, 0),
            "translate_y": lambda m, h, w: (1, 0, 0, 0, 1, 0.045 * m * h),
        },
    ),
    (
        _replacements,
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
    (_blends, {"color": _color, "sharpness": _sharpness}),
)
