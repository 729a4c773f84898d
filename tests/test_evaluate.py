"""Scores of a split are the means over its images, however it is cut into batches."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax import sharding
from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.evaluate import evaluate
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.step import make_eval_step

CLASSES = 8
QUICK = {"xla_backend_optimization_level": 0}  # to compile, which takes nearly all of the time here


@cache
def tiny():
    """Model, jitted eval_step, parameters without zeros, and a split of 10 images."""
    config = get_config()
    config.update_from_flattened_dict(
        {
            "model.patches.size": (4, 4),
            "model.hidden_dim": 8,
            "model.num_blocks": 1,
            "model.tokens_mlp_dim": 6,
            "model.channels_mlp_dim": 10,
        }
    )
    config = resolve(config, {})
    model = MlpMixer(num_classes=CLASSES, **config.model.to_dict())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(p.dtype) + (p.ndim == 1), shapes)
    params = jax.tree.map(np.float32, params)
    images = rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, 10, dtype=np.int32)
    return model, jax.jit(make_eval_step(model, config), compiler_options=QUICK), params, images, labels


def batches(images, labels, *, size, order=slice(None)):
    """Of one size, the last one padded with white images of label 0."""
    images, labels = images[order], labels[order]
    for i in range(0, len(images), size):
        pad = size - len(images[i : i + size])
        yield {
            "image": np.pad(images[i : i + size], ((0, pad), (0, 0), (0, 0), (0, 0)), constant_values=255),
            "label": np.pad(labels[i : i + size], (0, pad)),
            "mask": np.arange(size) < size - pad,
        }


@cache
def by_hand():
    model, _, params, images, labels = tiny()
    apply = jax.jit(lambda x: model.apply({"params": params}, x), compiler_options=QUICK)
    logits = np.float64(apply(np.float32(images) / 127.5 - 1))
    own = logits[np.arange(10), labels][:, None]
    rank = (logits > own).sum(1)
    return {
        "loss": (np.log(np.exp(logits).sum(1)) - own[:, 0]).mean(),
        "accuracy": (rank == 0).mean(),
        "accuracy_top5": (rank < 5).mean(),
    }


@pytest.mark.parametrize("size", [1, 4, 10, 16])  # of 10 images: 4 leaves 2 in the last batch
def test_scores_are_means_over_the_images_whatever_the_batch(size):
    _, eval_step, params, images, labels = tiny()
    scores = evaluate(eval_step, params, batches(images, labels, size=size), mesh=sharding.make_mesh())
    assert scores.keys() == by_hand().keys()
    assert all(type(value) is float for value in scores.values())
    for name, value in by_hand().items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=name)


def test_a_smaller_split_is_divided_by_its_own_size():
    _, eval_step, params, images, labels = tiny()
    mesh = sharding.make_mesh()
    first, rest = (
        evaluate(eval_step, params, batches(images, labels, size=4, order=part), mesh=mesh)
        for part in (slice(0, 7), slice(7, 10))
    )
    for name, value in by_hand().items():
        np.testing.assert_allclose(0.7 * first[name] + 0.3 * rest[name], value, rtol=1e-5, err_msg=name)


def test_the_split_tells_right_from_wrong():
    """The numbers above could be met by no constant, nor by counting the padding."""
    expected = by_hand()
    assert 0 < expected["accuracy"] < expected["accuracy_top5"] < 1
    _, eval_step, params, images, labels = tiny()
    counted = [{**b, "mask": np.ones(4, bool)} for b in batches(images, labels, size=4)]
    scores = evaluate(eval_step, params, counted, mesh=sharding.make_mesh())
    assert abs(scores["loss"] - expected["loss"]) > 0.01


def test_order_of_images_and_of_batches_does_not_matter():
    _, eval_step, params, images, labels = tiny()
    order = np.random.default_rng(1).permutation(10)
    shuffled = list(batches(images, labels, size=4, order=order))[::-1]  # the padded batch comes first
    scores = evaluate(eval_step, params, shuffled, mesh=sharding.make_mesh())
    for name, value in by_hand().items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=name)


def test_a_batch_of_padding_alone_changes_nothing():
    """Where processes share a split, one may run out of images before the others."""
    _, eval_step, params, images, labels = tiny()
    real = list(batches(images, labels, size=4))
    empty = {**real[0], "mask": np.zeros(4, bool)}
    mesh = sharding.make_mesh()
    assert evaluate(eval_step, params, [empty, *real, empty], mesh=mesh) == evaluate(
        eval_step, params, real, mesh=mesh
    )


def test_parameters_are_those_given():
    _, eval_step, params, images, labels = tiny()
    zeros = jax.tree.map(np.zeros_like, params)
    scores = evaluate(eval_step, zeros, batches(images, labels, size=4), mesh=sharding.make_mesh())
    np.testing.assert_allclose(scores["loss"], np.log(CLASSES), rtol=1e-5)
    # Of equal logits the lower class counts as the better one.
    assert scores["accuracy"] == pytest.approx((labels == 0).mean())
    assert scores["accuracy_top5"] == pytest.approx((labels < 5).mean())
