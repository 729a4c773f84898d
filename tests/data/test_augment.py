"""Augmentation: sizes and values, crops and flip, erasing and mixing do what their docstrings say."""

import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from PIL import Image
from scipy.stats import beta

from mlpmixer_flax import UserError
from mlpmixer_flax.config import RANDAUGMENT_OPS, get_config
from mlpmixer_flax.data import augment as aug

pytestmark = pytest.mark.usefixtures("quick_to_compile")

PREPROCESS = {
    "image_size_px": 16,
    "crop_fraction": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5,),
    "std": (0.25,),
}
EVERYTHING = {
    "crop_padding_px": 2,
    "min_crop_area": 0.5,
    "flip": True,
    "randaugment_layers": 1,
    "randaugment_ops": tuple(RANDAUGMENT_OPS),
    "erase_probability": 0.5,
    "mixup_alpha": 0.5,
    "cutmix_alpha": 1.0,
    "mix_probability": 0.8,
    "label_smoothing": 0.1,
}
BASE = get_config().to_dict()
KEY = jax.random.key(0)


def photographs(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Returns uint8 images with shapes, edges and grain, different in every image and channel."""
    rng = np.random.default_rng(n + height)
    y, x = np.mgrid[:height, :width] / height
    a, b, c, d = rng.uniform(-6, 6, (4, n, 1, 1, channels))
    waves = np.sin(a * x[..., None] + b * y[..., None] + c) + (d * (x - y)[..., None] > 0.5)
    return np.clip(90 + 70 * waves + rng.normal(0, 8, waves.shape), 0, 255).astype(np.uint8)


jitted = jax.jit(aug.augment, static_argnames=["num_classes", "preprocess", "cropped", *BASE["augment"]])


def run(images, *, key=KEY, num_classes=10, function: Callable = jitted, preprocess=PREPROCESS, **knobs):
    labels = np.arange(len(images)) % num_classes
    preprocess = FrozenDict(preprocess)  # hashable, because it is a static argument of jit
    out = function(key, images, labels, num_classes=num_classes, preprocess=preprocess, **knobs)
    return jax.tree.map(np.asarray, out)


# All operations together


def test_all_off_is_preprocessing_and_one_hot_labels():
    images = photographs(4, 24, 24)
    out, labels = run(images, **BASE["augment"])
    np.testing.assert_array_equal(out, jax.jit(lambda images: aug.prepare(images, **PREPROCESS))(images))
    np.testing.assert_array_equal(labels, np.eye(10)[:4])
    assert out.dtype == labels.dtype == np.float32


def test_what_is_off_costs_nothing():
    def compiled(**knobs):
        def call(key, images, labels):
            return aug.augment(key, images, labels, num_classes=10, preprocess=PREPROCESS, **knobs)

        lowered = jax.jit(call).lower(KEY, jnp.zeros((2, 16, 16, 3), jnp.uint8), jnp.zeros(2, int))
        return str(lowered.compile().as_text())

    # The random generator computes with xor.
    assert "xor" not in compiled() and "xor" in compiled(flip=True)


def test_the_options_are_the_keys_of_the_config():
    options = inspect.signature(aug.augment).parameters.keys()
    assert options - {"key", "images", "labels", "num_classes", "preprocess", "cropped"} == set(
        BASE["augment"]
    )
    options = inspect.signature(aug.prepare).parameters.keys()
    assert options - {"images", "cropped"} == {*BASE["preprocess"], "fit"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool", "int32"])
def test_images_that_are_not_levels_of_8_bits_are_refused(dtype):
    images = jnp.zeros((2, 24, 24, 3), dtype)
    for function in (
        lambda images: aug.prepare(images, **PREPROCESS),
        jax.jit(lambda images: aug.prepare(images, cropped=True, **PREPROCESS)),
        lambda images: run(images, **BASE["augment"]),
    ):
        with pytest.raises(UserError, match=f"the images are {dtype}, not uint8: give levels from 0 to 255"):
            function(images)


def test_images_that_the_host_has_cropped_are_not_cropped_again():
    images = photographs(4, 24, 24)
    ours = {"flip": True, "erase_probability": 0.5}
    for a, b in zip(
        run(images, cropped=True, min_crop_area=0.3, **ours),
        run(images, min_crop_area=1.0, **ours),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    preprocess = {**PREPROCESS, "crop_fraction": 0.5}
    out = aug.prepare(jnp.asarray(images), cropped=True, **preprocess)
    np.testing.assert_array_equal(out, aug.prepare(jnp.asarray(images), **PREPROCESS))
    assert (out != aug.prepare(jnp.asarray(images), **preprocess)).any()


@pytest.mark.slow
def test_everything_on_follows_the_key():
    images = photographs(6, 24, 24)
    out, labels = run(images, **EVERYTHING)
    again, labels_again = run(images, **EVERYTHING)
    other, other_labels = run(images, key=jax.random.key(1), **EVERYTHING)
    assert out.shape == (6, 16, 16, 3) and np.isfinite(out).all()
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert (out != other).any((1, 2, 3)).all() and (labels != other_labels).any()
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(channels):
    knobs = {"crop_padding_px": 2, "min_crop_area": 0.5, "flip": True}
    knobs |= {"randaugment_layers": 1, "randaugment_ops": ("rotate", "equalize", "color")}
    out, _ = run(photographs(3, 24, 24, channels), **knobs)
    assert out.shape == (3, 16, 16, channels) and (out.std((1, 2)) > 0).all()


@pytest.mark.slow
def test_jit_changes_nothing():
    knobs = {
        "crop_padding_px": 2,
        "flip": True,
        "randaugment_layers": 1,
        "randaugment_ops": ("shear_x", "contrast"),
    }
    images = photographs(4, 16, 16)
    for compiled, eager in zip(run(images, **knobs), run(images, function=aug.augment, **knobs), strict=True):
        np.testing.assert_allclose(compiled, eager, atol=1e-5)


def test_one_operation_does_not_move_the_draws_of_another():
    images = photographs(8, 16, 16)
    cropped, _ = run(images, crop_padding_px=2)
    erased, _ = run(images, crop_padding_px=2, erase_probability=1.0)
    same = (cropped == erased).all(-1).mean((1, 2))
    assert (same > 0.6).all() and (same < 1).all()


# Size and values


@pytest.mark.parametrize(
    ("interpolation", "resample"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
@pytest.mark.parametrize("size_px", [48, 20, 7])
def test_resize_equals_pillow(interpolation, resample, size_px):
    images = photographs(4, 32, 40)
    out = aug.resize(jnp.asarray(images), size_px, interpolation)
    expected = [np.asarray(Image.fromarray(image).resize((size_px, size_px), resample)) for image in images]
    # Pillow rounds to whole levels after each axis; we do not round.
    assert np.abs(np.round(out) - np.stack(expected)).max() <= 1


def test_images_of_the_right_size_are_not_touched():
    images = jnp.asarray(photographs(2, 16, 16))
    assert aug.resize(images, 16, "bicubic") is images


def test_prepare_equals_pillow_and_numpy():
    images, mean, std = photographs(3, 40, 40), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    out = aug.prepare(
        jnp.asarray(images),
        image_size_px=24,
        crop_fraction=0.875,
        interpolation="bicubic",
        mean=mean,
        std=std,
    )
    middle = [
        Image.fromarray(image[2:37, 2:37]).resize((24, 24), Image.Resampling.BICUBIC) for image in images
    ]
    expected = (np.stack([np.asarray(image) for image in middle]) / 255 - np.array(mean)) / np.array(std)
    assert out.dtype == np.float32
    # One level, plus the half level that Pillow may round away.
    assert (np.abs(np.asarray(out) - expected) * np.array(std) * 255).max() <= 1.5


def test_denormalize_restores_every_level_and_clips_other_values():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    scales = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    again = aug.denormalize(aug.normalize(jnp.asarray(levels), **scales), **scales)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, levels)
    beyond = jnp.array([-3, 3], jnp.float32).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(aug.denormalize(beyond, mean=(0.5,), std=(0.5,)).ravel(), [0, 255])


def test_normalize_to_minus_one_and_one():
    images = jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_array_equal(aug.normalize(images, mean=(0.5,), std=(0.5,)).ravel(), [-1, 1])


# Crops and flip


def test_random_crop_is_a_window_of_the_padded_image():
    image = photographs(1, 8, 10)[0] // 2 + 100  # only the padding has zeros
    out = np.asarray(aug.random_crop(KEY, jnp.asarray(np.stack([image] * 200)), padding_px=2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, ((2, 2), (2, 2), (0, 0))), image.shape)
    windows = windows.reshape(-1, *image.shape)
    hits = (out[:, None] == windows).all((2, 3, 4))
    assert len(windows) == 25 and (hits.sum(1) == 1).all()
    assert (hits.sum(0) > 0).all()  # every window is drawn


def test_random_resized_crop_keeps_area_and_aspect_ratio():
    # Levels that encode the position: 3 per pixel downwards in one channel, 3 per pixel to the
    # right in the other.
    y, x = np.mgrid[:80, :80]
    images = jnp.asarray(np.stack([np.stack([3 * y, 3 * x], -1)] * 300).astype(np.uint8))
    crop = partial(aug.random_resized_crop, size_px=32, min_area=0.25, interpolation="bilinear")
    out = jax.jit(crop)(KEY, images)
    assert out.dtype == np.uint8 and out.shape == (300, 32, 32, 2)
    out = np.asarray(out, float) / 3 + 0.5  # position in the image, in pixels
    height = (out[:, 27, 16, 0] - out[:, 4, 16, 0]) * 32 / 23
    width = (out[:, 16, 27, 1] - out[:, 16, 4, 1]) * 32 / 23
    top, left = out[:, 4, 16, 0] - 4.5 / 32 * height, out[:, 16, 4, 1] - 4.5 / 32 * width
    area, ratio = height * width / 80**2, width / height
    assert 0.24 < area.min() < 0.3 and 0.9 < area.max() < 1.03
    assert 0.73 < ratio.min() < 0.8 and 1.27 < ratio.max() < 1.37
    assert top.min() > -1 and left.min() > -1 and (top + height).max() < 81 and (left + width).max() < 81
    assert top.std() > 5 and left.std() > 5 and np.corrcoef(top, left)[0, 1] < 0.9


def test_random_resized_crop_of_the_whole_image_is_resize():
    images = jnp.asarray(photographs(3, 24, 24))
    crop = partial(aug.random_resized_crop, size_px=32, min_area=0.99999, interpolation="bicubic")
    out = jax.jit(crop)(KEY, images)
    assert np.abs(np.asarray(out, float) - aug.resize(images, 32, "bicubic")).max() <= 1


def test_random_flip_mirrors_half_of_the_images():
    images = photographs(200, 6, 6)
    out = np.asarray(aug.random_flip(KEY, jnp.asarray(images)))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored ^ (out == images).all((1, 2, 3))).all()
    assert 0.35 < mirrored.mean() < 0.65


# Erasing and mixing


def test_random_erase_fills_one_rectangle_with_noise():
    images = jnp.full((300, 16, 20, 2), 9.0)
    out = np.asarray(jax.jit(partial(aug.random_erase, probability=0.5))(KEY, images))
    changed = out != 9
    assert (changed[..., 0] == changed[..., 1]).all()
    erased = changed[..., 0].any((1, 2))
    assert 0.4 < erased.mean() < 0.6
    sides = []
    for mask in changed[erased, ..., 0]:
        sides.append((mask.any(1).sum(), mask.any(0).sum()))
        (top, left), (bottom, right) = np.argwhere(mask).min(0), np.argwhere(mask).max(0) + 1
        assert mask[top:bottom, left:right].all() and mask.sum() == (bottom - top) * (right - left)
    height, width = np.array(sides).T
    assert 0.01 < (height * width / 320).min() < 0.05 and 0.3 < (height * width / 320).max() < 0.36
    assert (height > 2 * width).any() and (width > 2 * height).any()
    assert changed[:, [0, -1]].any((0, 2, 3)).all() and changed[:, :, [0, -1]].any((0, 1, 3)).all()
    noise = out[changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_smoothed_labels():
    labels = aug.smooth_labels(jnp.array([2, 0]), 4, smoothing=0.2)
    np.testing.assert_allclose(labels, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)


MIXUP, CUTMIX = {"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("knobs", "probability"), [(MIXUP, 1.0), (CUTMIX, 1.0), (MIXUP | CUTMIX, 1.0), (MIXUP | CUTMIX, 0.5)]
)
def test_labels_are_mixed_in_the_same_proportion_as_pixels(knobs, probability):
    n = 64
    # All pixels of an image are its class, so a mixed pixel shows how much it has of each of the two images.
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None] * 3, (n, 16, 16, 1))
    plain = {**PREPROCESS, "mean": (0,), "std": (3 / 255,)}
    out, labels = run(images, num_classes=n, preprocess=plain, mix_probability=probability, **knobs)
    own, before = np.arange(n), np.arange(n) - 1
    keeps = labels[own, own]
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(keeps + labels[own, before], 1, atol=1e-6)
    np.testing.assert_allclose(out.mean((1, 2, 3)), keeps * own + (1 - keeps) * (before % n), atol=1e-3)
    touched = keeps < 1
    assert touched.mean() > 0.85 if probability == 1 else 0.25 < touched.mean() < 0.75
    blended = np.ptp(out, axis=(1, 2, 3)) < 1e-3  # the same weight at every pixel
    if "cutmix_alpha" not in knobs:
        assert blended.all() and len(np.unique(keeps[touched].round(5))) > 10
    elif "mixup_alpha" not in knobs:
        pixels = out.round(3)[..., 0]
        assert ((pixels == own[:, None, None]) | (pixels == (before % n)[:, None, None])).all()
        assert (~blended).mean() > 0.6 * touched.mean()
    else:
        assert 0.15 < (~blended).sum() / touched.sum() < 0.85


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5, 1.0, 2.0, 30.0])
def test_symmetric_beta_has_the_quantiles_of_its_distribution(alpha):
    drawn = np.asarray(aug.symmetric_beta(KEY, alpha, (100_000,)))
    assert drawn.min() >= 0 and drawn.max() <= 1
    shares = np.linspace(0.02, 0.98, 49)
    # Where the density has no limit, a quantile is not stable, but its share is.
    at_quantile = (drawn <= beta.ppf(shares, alpha, alpha)[:, None] + 1e-6).mean(1)
    lower, upper = (beta.cdf(beta.ppf(shares, alpha, alpha) + margin, alpha, alpha) for margin in (0, 1e-6))
    assert (at_quantile > lower - 0.007).all() and (at_quantile < upper + 0.007).all()


def test_cutmix_cuts_one_rectangle_of_the_drawn_area():
    masks = np.asarray(jax.jit(lambda key: aug.cutmix_mask(key, (400, 20, 30, 3), alpha=1.0))(KEY))[..., 0]
    assert set(np.unique(masks)) == {0, 1} and masks.shape == (400, 20, 30)
    for mask in masks[(masks == 0).any((1, 2))] == 0:
        rows, columns = mask.any(1), mask.any(0)
        assert (mask == np.outer(rows, columns)).all()
        assert (np.diff(np.flatnonzero(rows)) == 1).all() and (np.diff(np.flatnonzero(columns)) == 1).all()
    # Beta(1, 1) is uniform. With a uniform centre, s - s^2 / 4 of a side s is inside the image, and
    # E[(s - s^2 / 4)^2] = 1/2 - 1/5 + 1/48 if s^2 is uniform.
    assert (1 - masks).mean() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.04)
    assert masks.mean(0).std() < 0.1
