"""Compares the schedules and optimizers with NumPy."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax.config import get_config, in_steps, resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.optimizer import kernels_only, make_optimizer, make_schedule
from mlpmixer_flax.training.validate import CHOICES, validate


def config_with(**values):
    config = get_config()
    config.update_from_flattened_dict(values)
    return resolve(config, {})


def by_hand(name, step, *, peak, total, warmup, final):
    if step < warmup:
        return peak * step / warmup
    share = min((step - warmup) / (total - warmup), 1.0)
    return {
        "cosine": peak * (final + (1 - final) * (1 + math.cos(math.pi * share)) / 2),
        "linear": peak * (1 + (final - 1) * share),
        "constant": peak,
        "rsqrt": peak * math.sqrt(warmup / step) if step else None,
    }[name]


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "warmup"),
    [(name, warmup) for name in CHOICES["schedule.name"] for warmup in (0, 8) if name != "rsqrt" or warmup],
)
def test_schedule_equals_its_formula_at_every_step(name, warmup, final):
    config = config_with(
        **{
            "schedule.name": name,
            "schedule.final_fraction": final,
            "optimizer.learning_rate": 0.3,
        }
    )
    schedule = make_schedule(config, total_steps=28, warmup_steps=warmup)
    steps = np.arange(31)  # past the end, too
    expected = [by_hand(name, s, peak=0.3, total=28, warmup=warmup, final=final) for s in steps]
    # cos near pi in float32 leaves 1e-8 of the peak where the formula has 0.
    np.testing.assert_allclose(jax.jit(schedule)(steps), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "landmarks"),  # step -> share of the peak, warmup 10 of 110 steps, final_fraction 0.2
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 60: 0.6, 110: 0.2}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 60: 0.6, 85: 0.4, 110: 0.2}),
        ("constant", {0: 0, 5: 0.5, 10: 1, 60: 1, 110: 1}),
        ("rsqrt", {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3}),
    ],
)
def test_schedule_passes_its_landmarks(name, landmarks):
    config = config_with(
        **{"schedule.name": name, "schedule.final_fraction": 0.2, "optimizer.learning_rate": 2.0}
    )
    schedule = jax.jit(make_schedule(config, total_steps=110, warmup_steps=10))
    shares = schedule(np.array(list(landmarks))) / 2.0
    np.testing.assert_allclose(shares, list(landmarks.values()), rtol=1e-5)


@pytest.mark.parametrize("name", CHOICES["schedule.name"])
def test_schedule_is_finite_if_the_warmup_takes_the_whole_run(name):
    config = config_with(**{"schedule.name": name, "optimizer.learning_rate": 1.0})
    schedule = jax.jit(make_schedule(config, total_steps=5, warmup_steps=8))
    np.testing.assert_allclose(schedule(np.arange(5)), np.arange(5) / 8, rtol=1e-6)


def test_rsqrt_learns_if_the_warmup_is_a_small_part_of_an_epoch():
    """warmup_epochs=0.01 with 30 steps per epoch is one step. With 0 steps the rate would always be 0."""
    config = config_with(**{"schedule.name": "rsqrt", "schedule.warmup_epochs": 0.01})
    validate(config)
    warmup_steps = in_steps(config.schedule, "warmup", 30)
    assert warmup_steps == 1
    schedule = jax.jit(make_schedule(config, total_steps=10, warmup_steps=warmup_steps))
    rates = schedule(np.arange(10))
    assert np.isfinite(rates).all() and rates[0] == 0 and (rates[1:] > 0).all(), rates  # warmup starts at 0


# Optimizers, on a tree with every kind of leaf


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    return {
        "stem": {"kernel": leaf(2, 2, 1, 3), "bias": leaf(3)},
        "LayerNorm_0": {"scale": leaf(3), "bias": leaf(3)},
        "head": {"kernel": leaf(3, 2), "bias": leaf(2)},
    }


def is_kernel(path):
    return path[-1].key == "kernel"


def descend(config, params, grads_of_steps, schedule=lambda step: 0.1 / (1 + step)):
    """Returns the parameters after each update, and the last optimizer state."""
    optimizer = make_optimizer(config, schedule)
    state, history = jax.jit(optimizer.init)(params), []

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for grads in grads_of_steps:
        params, state = update(grads, state, params)
        history.append(params)
    return history, state


def descend_by_hand(config, params, grads_of_steps):
    """Does the same in float64 with the formulas of the papers; the learning rate is 0.1 / (1 + step)."""
    o, history = config.optimizer, []
    params = jax.tree.map(np.float64, params)
    first = second = jax.tree.map(np.zeros_like, params)
    for step, grads in enumerate(grads_of_steps):
        grads = jax.tree.map(np.float64, grads)
        norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        if o.clip_norm and norm > o.clip_norm:
            grads = jax.tree.map(lambda g, by=o.clip_norm / norm: g * by, grads)
        if o.name == "sgd":
            first = jax.tree.map(lambda m, g: o.momentum * m + g, first, grads)
            direction = first
        else:
            first = jax.tree.map(lambda m, g: o.b1 * m + (1 - o.b1) * g, first, grads)
            second = jax.tree.map(lambda v, g: o.b2 * v + (1 - o.b2) * g * g, second, grads)
            a, b = 1 - o.b1 ** (step + 1), 1 - o.b2 ** (step + 1)
            direction = jax.tree.map(lambda m, v, a=a, b=b: (m / a) / (np.sqrt(v / b) + 1e-8), first, second)
        params = jax.tree_util.tree_map_with_path(
            lambda path, p, d, lr=0.1 / (1 + step): p - lr * (d + o.weight_decay * is_kernel(path) * p),
            params,
            direction,
        )
        history.append(params)
    return history


@pytest.mark.parametrize(
    "values",
    [
        {"name": "sgd", "momentum": 0.9, "clip_norm": 0.0},
        {"name": "sgd", "momentum": 0.5, "clip_norm": 1.5, "weight_decay": 0.2},
        {"name": "adam", "b1": 0.8, "b2": 0.95, "clip_norm": 0.0},
        {"name": "adamw", "b1": 0.8, "b2": 0.95, "clip_norm": 1.5, "weight_decay": 0.2},
    ],
    ids=lambda values: f"{values['name']}-clip{values['clip_norm']}",
)
def test_optimizer_equals_its_formula_over_several_steps(values):
    config = config_with(**{f"optimizer.{key}": value for key, value in values.items()})
    # Some gradients are above and some below 1.5, the norm at which they are clipped.
    grads = [tree(seed, scale) for seed, scale in ((1, 1.0), (2, 0.1), (3, 3.0), (4, 0.2))]
    history, _ = descend(config, tree(0), grads)
    expected = descend_by_hand(config, tree(0), grads)
    for ours, theirs in zip(history, expected, strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "norm"), [(1.0, 0.5), (0.01, None)])
def test_gradient_is_clipped_by_its_global_norm_and_only_above_it(scale, norm):
    config = config_with(**{"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.clip_norm": 0.5})
    grads = tree(1, scale)
    (after,), _ = descend(config, jax.tree.map(np.zeros_like, grads), [grads], lambda step: 1.0)
    flat, applied = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (grads, after))
    length = np.linalg.norm(flat.astype(np.float64))
    assert (length > 0.5) == (norm is not None)  # or the test would not test clipping
    np.testing.assert_allclose(np.linalg.norm(applied), norm or length, rtol=1e-5)
    np.testing.assert_allclose(applied / np.linalg.norm(applied), -flat / length, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_is_decoupled_and_changes_only_kernels(name):
    """Without a gradient, the update is the decay alone: learning rate x decay x parameter."""
    config = config_with(**{"optimizer.name": name, "optimizer.weight_decay": 0.2})
    params = tree(0)
    (after,), _ = descend(config, params, [jax.tree.map(np.zeros_like, params)], lambda step: 0.5)

    def check(path, before, after):
        if is_kernel(path):
            np.testing.assert_allclose(before - after, 0.5 * 0.2 * before, rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(after, before)

    jax.tree_util.tree_map_with_path(check, params, after)


def test_decay_covers_exactly_the_kernels_of_the_model():
    config = config_with(**{"model.num_blocks": 1, "model.patches.size": (4, 4)})
    model = MlpMixer(num_classes=3, **config.model.to_dict())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    names = jax.tree_util.tree_map_with_path(lambda path, p: is_kernel(path), shapes)
    assert kernels_only(shapes) == names
    assert sum(jax.tree.leaves(names)) == 6  # stem, two in each MLP, head


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_bfloat16_accumulator_has_this_dtype_and_holds_the_rounded_moment(name):
    values = {"optimizer.name": name, "optimizer.clip_norm": 0.0, "optimizer.accumulator_dtype": "bfloat16"}
    grads = tree(1)
    (after,), state = descend(config_with(**values), tree(0), [grads])
    stored = {
        dtype: [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.dtype == dtype]
        for dtype in (jnp.bfloat16, jnp.float32)
    }
    assert len(stored[jnp.bfloat16]) == len(jax.tree.leaves(grads))  # momentum or Adam's first moment
    assert len(stored[jnp.float32]) == (0 if name == "sgd" else len(jax.tree.leaves(grads)))
    share = 1.0 if name == "sgd" else 0.1  # 1 - b1
    for leaf, grad in zip(stored[jnp.bfloat16], jax.tree.leaves(grads), strict=True):
        # 8 bits of mantissa, rounded to nearest
        np.testing.assert_allclose(np.float32(leaf), share * grad, rtol=2**-8)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(after))
    (plain,), state = descend(
        config_with(**{**values, "optimizer.accumulator_dtype": "float32"}), tree(0), [grads]
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)
    chex.assert_trees_all_close(after, plain, rtol=1e-6)  # only the stored moment is rounded, not this update
