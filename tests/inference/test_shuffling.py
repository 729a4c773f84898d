"""Shuffled images have the same pixels; a Mixer with weights shuffled in the same way gives the same logits."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.shuffling import (
    seeing,
    shuffle_patches,
    shuffle_pixels,
    shuffle_weights,
    symmetry,
)
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.setup import make_setup, settle

PATCH = (2, 4)  # of images of 6 x 8 px: three rows of two patches
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time here


def places(images):
    """Returns the patches of an image from `numbered`, as lists of (number of the patch, number of the pixel in it)."""
    patches = images.reshape(3, 2, 2, 4).swapaxes(1, 2).reshape(6, 8)
    return [[divmod(int(value), 8) for value in patch] for patch in patches]


def numbered():
    """Returns one image of 6 x 8 px in which pixel k of patch p is 8 p + k."""
    return np.arange(48).reshape(3, 2, 2, 4).swapaxes(1, 2).reshape(1, 6, 8, 1)


def test_patches_are_shuffled_and_so_are_the_pixels_inside_them_in_one_order():
    assert places(numbered()) == [[(p, k) for k in range(8)] for p in range(6)]
    found = places(shuffle_patches(numbered(), patch_px=PATCH, seed=0))
    order = [patch[0][0] for patch in found]
    pixels = [k for _, k in found[0]]
    assert sorted(order) == list(range(6)) != order
    assert sorted(pixels) == list(range(8)) != pixels
    assert found == [[(p, k) for k in pixels] for p in order]


def test_shuffled_pixels_come_from_the_whole_image():
    shuffled = shuffle_pixels(numbered(), seed=0)
    assert sorted(shuffled.ravel()) == list(range(48))
    assert all(len({p for p, _ in patch}) > 2 for patch in places(shuffled))


@pytest.mark.parametrize("shuffle", [partial(shuffle_patches, patch_px=PATCH), shuffle_pixels])
def test_the_order_is_the_same_for_all_images_and_channels_and_depends_on_the_seed(shuffle):
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 2), dtype=np.uint8)
    shuffled = shuffle(images, seed=1)
    assert shuffled.dtype == np.uint8 and shuffled.shape == images.shape
    for n in range(3):
        for c in range(2):
            alone = shuffle(images[n : n + 1, ..., c : c + 1], seed=1)
            np.testing.assert_array_equal(shuffled[n, ..., c], alone[0, ..., 0])
    np.testing.assert_array_equal(shuffle(jnp.asarray(images, jnp.float32), seed=1), shuffled)
    assert (shuffle(images, seed=2) != shuffled).any()


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(UserError, match="4x2 px does not divide an image of 6x8"):
        shuffle_patches(numbered(), patch_px=(4, 2), seed=0)


@cache
def tiny_setup():
    """Returns the setup of a run with random flips, because images must be shuffled after flips."""
    values = {
        "model.hidden_dim": 8,
        "model.num_blocks": 1,
        "model.patches.size": (2, 4),
        "optimizer.name": "sgd",
        "augment.flip": True,
        "augment.mixup_alpha": 0,
    }
    config = load_config("digits.py", [f"--config.{key}={value}" for key, value in values.items()])
    return make_setup(settle(config, {}))


@cache
def random_params():
    """Returns random parameters of the model; none of them is zero."""
    shapes = jax.eval_shape(tiny_setup().init, None).params
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: np.float32(rng.normal(0, 0.3, p.shape) + (p.ndim == 1)), shapes)


def train(update, params):
    state, losses = tiny_setup().init(params), []
    for k in range(3):
        state, metrics = update(state, tiny_setup().train_batches[k])
        losses.append(float(metrics["loss"]))
    return losses, state.params


@pytest.mark.long
@pytest.mark.slow
def test_training_shuffled_weights_on_shuffled_patches_gives_the_same_losses():
    update = jax.jit(tiny_setup().update, compiler_options=QUICK)
    shuffle = partial(shuffle_patches, patch_px=PATCH, seed=3)
    shuffled_update = jax.jit(seeing(tiny_setup().update, shuffle), compiler_options=QUICK)
    losses, params = train(update, random_params())
    found, found_params = train(shuffled_update, shuffle_weights(random_params(), seed=3))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    chex.assert_trees_all_close(found_params, shuffle_weights(params, seed=3), atol=1e-5)
    others, _ = train(shuffled_update, random_params())
    assert abs(np.array(others) / losses - 1).max() > 3e-4


def test_logits_are_equal_only_if_weights_are_shuffled_in_the_same_way_as_images():
    module = tiny_setup().model
    model = Model("", module, random_params(), {"image_size_px": 8}, (), "softmax", {})
    largest, difference = symmetry(model, seed=3)
    assert largest > 1 and difference < 1e-5 * largest
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
    apply = jax.jit(lambda params, images: module.apply({"params": params}, images))
    logits = apply(random_params(), images)
    shuffled = shuffle_patches(images, patch_px=PATCH, seed=3)
    for params in (random_params(), shuffle_weights(random_params(), seed=4)):
        assert abs(apply(params, shuffled) - logits).max() > 0.1


def test_everything_that_belongs_to_a_token_moves_with_it():
    """Also the bias, whose order the logits do not show, because a LayerNorm follows."""
    tokens = np.arange(8.0)
    mlp = {
        "Dense_0": {"kernel": np.tile(tokens[:, None], (1, 3)), "bias": np.zeros(3)},
        "Dense_1": {"kernel": np.tile(tokens, (3, 1)), "bias": tokens},
    }
    params = {"stem": {"kernel": np.zeros((2, 4, 1, 5))}, "MixerBlock_0": {"token_mixing": mlp}}
    shuffled = shuffle_weights(params, seed=3)["MixerBlock_0"]["token_mixing"]
    order = shuffled["Dense_1"]["bias"]
    assert sorted(order) == list(tokens) != list(order)
    assert (shuffled["Dense_0"]["kernel"] == order[:, None]).all()
    assert (shuffled["Dense_1"]["kernel"] == order).all()
