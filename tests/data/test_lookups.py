"""Both forms of the lookups, for TPUs and for other devices, give the same pixels; the one for TPUs has no index."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax.config import RANDAUGMENT_OPS
from mlpmixer_flax.data import lookups
from mlpmixer_flax.data.randaugment import _PASSES, _source, apply_ops

pytestmark = pytest.mark.usefixtures("quick_to_compile")

WARPS = _PASSES[0][1]


def images(n: int, h: int, w: int, c: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(h + w).integers(0, 256, (n, h, w, c), dtype=np.uint8))


def sources(h: int, w: int, magnitude: float) -> list[lookups.PixelMap]:
    return [_source(warp(m, h, w), h, w) for warp in WARPS.values() for m in (magnitude, -magnitude)]


def both(pixels: jax.Array, drawn: jax.Array, every: list[lookups.PixelMap]) -> list[np.ndarray]:
    """Returns the images as warped by index and as warped by products."""
    forms = (lookups._warp, lookups._warp_on_tpu)
    return [np.asarray(jax.jit(partial(form, sources=every))(pixels, drawn)) for form in forms]


@pytest.mark.parametrize(("magnitude", "side"), [(0, 9), (10, 9), (15, 32), (20, 9), (30, 9)])
def test_warps_by_products_equal_warps_by_index(side, magnitude):
    every = sources(side, side, magnitude)
    pixels, drawn = images(len(every) + 2, side, side), jnp.arange(len(every) + 2) - 1
    expected, out = both(pixels, drawn, every)
    np.testing.assert_array_equal(out, expected)
    for untouched in (0, -1):  # drew -1, and a number that is too large
        np.testing.assert_array_equal(expected[untouched], pixels[untouched])


def test_a_warp_by_any_angle_and_one_that_leaves_only_gray():
    def rotated(degrees: float) -> lookups.PixelMap:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return _source((cos, sin, 10 - 10 * cos - 10 * sin, -sin, cos, 10 + 10 * sin - 10 * cos), 20, 20)

    every = [rotated(degrees) for degrees in (-180, -120, -75, -50, 15, 89, 135)]
    every += [_source((1, 0, 99, 0, 1, 0), 20, 20), _source((1, 0, 0, 0, 1, -99), 20, 20)]
    pixels, drawn = images(len(every), 20, 20, 1), jnp.arange(len(every))
    expected, out = both(pixels, drawn, every)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out[-2:], 128)
    np.testing.assert_array_equal(out[0], pixels[0, ::-1, ::-1])


def test_an_oblong_image_is_warped_too():
    every = sources(9, 14, 10)
    pixels, drawn = images(len(every), 9, 14), jnp.arange(len(every))
    expected, out = both(pixels, drawn, every)
    np.testing.assert_array_equal(out, expected)
    assert (out != pixels).any((1, 2, 3)).all()


@pytest.mark.parametrize(("magnitude", "side"), [(10, 32), (15, 224)])
def test_warps_share_maps_and_few_products(side, magnitude):
    """The cost on a TPU: one product for each shear and translation by x and its sign, four for all rotations."""
    plans = [lookups._plan(source) for source in sources(side, side, magnitude)]
    different = {plan.key: plan for plan in plans}.values()
    products = [len(plan.in_rows) * (1 + (plan.in_columns is not None)) for plan in different]
    assert sorted(products) == [1, 1, 1, 1, 4]


@pytest.mark.slow
def test_tables_and_counts_without_an_index():
    pixels = images(4, 12, 10)
    table = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 3, 256)))
    out = lookups.look_up(pixels, table)
    np.testing.assert_array_equal(jax.jit(lookups._look_up_on_tpu)(pixels, table), out)
    for i, channel in np.ndindex(4, 3):
        np.testing.assert_array_equal(out[i, ..., channel], table[i, channel][pixels[i, ..., channel]])
    np.testing.assert_array_equal(jax.jit(lookups._count_levels_on_tpu)(pixels), lookups.count_levels(pixels))


@pytest.mark.slow
def test_counts_of_a_tall_image_do_not_overflow():
    flat = jnp.full((1, 300, 3, 1), 255, jnp.uint8)
    counts = np.asarray(jax.jit(lookups._count_levels_on_tpu)(flat))
    assert counts[0, 0, 255] == 900 and counts.sum() == 900


def test_a_layer_for_a_tpu_has_no_gather_and_no_scatter():
    def lowered(platform: str) -> str:
        def layer(pixels, drawn, sign):
            return apply_ops(pixels, drawn, sign, magnitude=15.0, ops=RANDAUGMENT_OPS)

        traced = jax.jit(layer).trace(images(2, 16, 16), jnp.zeros(2, int), jnp.ones(2))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    by_index = ("stablehlo.gather", "stablehlo.scatter")
    assert all(op in lowered("cpu") for op in by_index)
    assert not any(op in lowered("tpu") for op in by_index)
