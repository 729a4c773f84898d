"""Moves pixels, replaces levels and counts them, for a whole batch: each in one form for TPUs and one for others.

CPUs and GPUs read and write by index (gather and scatter). A TPU does that one element at a time, so its forms
compare and multiply instead; they give the same result. The images of a batch lie side by side in a TPU's vector
registers, so an operation on all of them costs little, although most of them do not need it.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GRAY = 128  # for pixels that a warp takes from outside the image


class PixelMap(NamedTuple):
    """Where each pixel of a warped image comes from: int (h, w) each; both are -1 outside the source image."""

    row: np.ndarray
    column: np.ndarray


def warp(images: jax.Array, drawn: jax.Array, sources: Sequence[PixelMap]) -> jax.Array:
    """Moves the pixels of uint8 images (n, h, w, c); pixels from outside an image are gray (128).

    Image i follows `sources[drawn[i]]`. It stays as it is if `drawn` (n,) is not an index of `sources`.
    """
    return jax.lax.platform_dependent(
        images, drawn, default=partial(_warp, sources=sources), tpu=partial(_warp_on_tpu, sources=sources)
    )


def look_up(images: jax.Array, table: jax.Array) -> jax.Array:
    """Replaces each level of uint8 images (n, h, w, c) by its entry in the tables (n, c or 1, 256)."""
    n, _, _, c = images.shape
    table = jnp.broadcast_to(table, (n, c, 256))
    return jax.lax.platform_dependent(images, table, default=_look_up, tpu=_look_up_on_tpu)


def count_levels(images: jax.Array) -> jax.Array:
    """Returns how many pixels have each level: uint8 (n, h, w, c) -> int32 (n, c, 256)."""
    return jax.lax.platform_dependent(images, default=_count_levels, tpu=_count_levels_on_tpu)


# By index


def _warp(images: jax.Array, drawn: jax.Array, *, sources: Sequence[PixelMap]) -> jax.Array:
    n, h, w, c = images.shape
    itself = np.arange(h * w)
    flat = [np.where(source.row < 0, -1, source.row * w + source.column).ravel() for source in sources]
    known = (drawn >= 0) & (drawn < len(flat))
    index = jnp.asarray(np.stack([*flat, itself]), jnp.int32)[jnp.where(known, drawn, len(flat))][..., None]
    moved = jnp.take_along_axis(
        images.reshape(n, h * w, c), jnp.maximum(index, 0), axis=1, mode="promise_in_bounds"
    )
    return jnp.where(index < 0, np.uint8(GRAY), moved).reshape(images.shape)


def _look_up(images: jax.Array, table: jax.Array) -> jax.Array:
    n, h, w, c = images.shape
    index = images.reshape(n, h * w, c).astype(jnp.int32)
    table = table.swapaxes(1, 2).astype(jnp.uint8)
    return jnp.take_along_axis(table, index, axis=1, mode="promise_in_bounds").reshape(images.shape)


def _count_levels(images: jax.Array) -> jax.Array:
    n, h, w, c = images.shape
    bins = images.reshape(n, h * w, c).astype(jnp.int32) + 256 * np.arange(c)
    # One scatter per image is many times as fast on a CPU as comparing every pixel with every level.
    counts = jax.vmap(lambda bins: jnp.zeros(c * 256, jnp.int32).at[bins].add(1))(bins)
    return counts.reshape(n, c, 256)


# Without an index. The compiler lays images out as (h, c, w, n), so a transposition to this order moves nothing.


def _to_planes(images: jax.Array) -> jax.Array:
    return images.transpose(1, 3, 2, 0)


def _from_planes(planes: jax.Array) -> jax.Array:
    return planes.astype(jnp.uint8).transpose(3, 0, 2, 1)


def _warp_on_tpu(images: jax.Array, drawn: jax.Array, *, sources: Sequence[PixelMap]) -> jax.Array:
    """Warps by products with matrices of zeros and ones: pixels move in rows, and then some in columns too.

    Levels minus 128 are whole numbers that bfloat16 has, and 0, the product with zeros only, is gray.
    """
    _, h, w, _ = images.shape
    if h != w:  # moving a square in columns is moving the transposed square in rows
        return _warp(images, drawn, sources=sources)
    plans = [_plan(source) for source in sources]

    def drew(numbers: Sequence[int]) -> jax.Array:
        return (drawn == np.array(numbers)[:, None]).any(0)

    def transposed(planes: jax.Array, when: Sequence[bool]) -> jax.Array:
        return jnp.where(drew([i for i, yes in enumerate(when) if yes]), planes.swapaxes(0, 2), planes)

    planes = _to_planes(images).astype(jnp.bfloat16) - GRAY
    planes = transposed(planes, [plan.transpose_before for plan in plans])
    same: dict[bytes, list[int]] = {}
    for number, plan in enumerate(plans):
        same.setdefault(plan.key, []).append(number)
    known = (drawn >= 0) & (drawn < len(sources))
    moved = jnp.where(known, 0, planes)
    in_rows = [numbers for numbers in same.values() if plans[numbers[0]].in_columns is None]
    if in_rows:
        chosen = jnp.stack([drew(numbers) for numbers in in_rows])[:, None, None, None]
        index = np.stack([plans[numbers[0]].in_rows[0] for numbers in in_rows])
        moved += _product("kvxu,kvcun->vcxn", index, w, jnp.where(chosen, planes, 0))
    for numbers in same.values():
        plan = plans[numbers[0]]
        if plan.in_columns is not None:
            both = _product("ivxu,vcun->ivcxn", plan.in_rows, w, jnp.where(drew(numbers), planes, 0))
            rows = np.arange(len(both))[:, None, None] * h
            moved += _product("iyxv,ivcxn->ycxn", plan.in_columns - rows, h, both)
    moved = transposed(moved, [plan.transpose_after for plan in plans])
    return _from_planes(moved + GRAY)


def _product(equation: str, index: np.ndarray, length: int, planes: jax.Array) -> jax.Array:
    ones = jnp.asarray(index, jnp.int32)[..., None] == np.arange(length)
    return jnp.einsum(equation, ones.astype(planes.dtype), planes, preferred_element_type=planes.dtype)


class _Plan(NamedTuple):
    """A warp of a square in steps: transpose, move pixels in rows, move them in columns (unless None), transpose.

    Two pixels of one column of the result may come from one row of the source. So the second step makes several
    images, and the third reads row i * side + row for row `row` of image i.
    """

    in_rows: np.ndarray  # (images, side, side): the column in the source, or -1
    in_columns: np.ndarray | None  # (side, side): the row in the images, one below the other, or -1
    transpose_before: bool
    transpose_after: bool

    @property
    def key(self) -> bytes:
        return self.in_rows.tobytes() + (b"" if self.in_columns is None else self.in_columns.tobytes())


def _plan(source: PixelMap) -> _Plan:
    """Returns the plan with the fewest products; among these, always the same one if sources allow it."""
    row, column = source
    orders = [
        (row, column, False, False),
        (column, row, True, False),
        (row.T, column.T, False, True),
        (column.T, row.T, True, True),
    ]
    products = [_count_products(first) for first, *_ in orders]
    best = [_steps(*order) for order, count in zip(orders, products, strict=True) if count == min(products)]
    return min(best, key=lambda plan: plan.key)


def _count_products(row: np.ndarray) -> int:
    image = _images(row)
    return (image.max() + 1) * (1 if _rows_stay(row, image) else 2)


def _steps(row: np.ndarray, column: np.ndarray, *transpose: bool) -> _Plan:
    side = len(row)
    image, inside = _images(row), row >= 0
    in_rows = np.full((image.max() + 1, side, side), -1)
    in_rows[image[inside], row[inside], np.nonzero(inside)[1]] = column[inside]
    in_columns = None if _rows_stay(row, image) else np.where(inside, image * side + row, -1)
    return _Plan(in_rows, in_columns, *transpose)


def _images(row: np.ndarray) -> np.ndarray:
    """Returns for each pixel the number of the image that it comes from, int (side, side)."""
    # Along a column of the result, the row of the source never turns back: equal rows are neighbors.
    y = np.arange(len(row))[:, None]
    image = y - np.maximum.accumulate(np.where(np.diff(row, axis=0, prepend=-2) != 0, y, 0))
    return np.where(row >= 0, image, 0)


def _rows_stay(row: np.ndarray, image: np.ndarray) -> bool:
    y = np.arange(len(row))[:, None]
    # A pixel from outside has become gray in the first step already.
    return bool((((row == y) & (image == 0)) | (row < 0)).all())


def _look_up_on_tpu(images: jax.Array, table: jax.Array) -> jax.Array:
    levels = _to_planes(images).astype(jnp.uint32)
    # Four entries in one number, so that there are 64 numbers to choose from, not 256.
    shifts = 8 * np.arange(4, dtype=np.uint32)
    fours = (table.astype(jnp.uint32).reshape(*table.shape[:2], 64, 4) << shifts).sum(-1, dtype=jnp.uint32)
    fours = fours.transpose(2, 1, 0)[:, :, None]
    found = jnp.zeros_like(levels)
    for four in range(64):
        found = jnp.where(levels >> 2 == four, fours[four], found)
    return _from_planes(found >> 8 * (levels & 3) & 255)


def _count_levels_on_tpu(images: jax.Array) -> jax.Array:
    # Four counts of 8 bits in one number, of up to 255 rows.
    blocks = [images[:, first : first + 255] for first in range(0, images.shape[1], 255)]
    return sum(map(_count_in_rows, blocks), start=jnp.int32(0))


def _count_in_rows(images: jax.Array) -> jax.Array:
    levels = _to_planes(images).astype(jnp.uint32)
    one = jnp.uint32(1) << 8 * (levels & 3)
    fours = jnp.stack([jnp.where(levels >> 2 == four, one, 0).sum(0, dtype=jnp.uint32) for four in range(64)])
    counts = jnp.stack([(fours >> 8 * part & 255).sum(2, dtype=jnp.uint32) for part in range(4)], axis=1)
    return counts.reshape(256, *counts.shape[2:]).transpose(2, 1, 0).astype(jnp.int32)
