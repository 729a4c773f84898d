"""Every RandAugment op against Pillow, on drawn photographs and, if $TFDS_DATA_DIR has it, on CIFAR-10."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from mlpmixer_flax import UserError
from mlpmixer_flax.config import RANDAUGMENT_OPS
from mlpmixer_flax.data.randaugment import _PASSES, apply_ops, check_ops, randaugment

WITHOUT_MAGNITUDE = {"auto_contrast", "equalize", "invert"}


def photograph(seed: int, *, width: int = 32, height: int = 32) -> Image.Image:
    """Returns a gradient with blurred discs and grain: many levels, edges, colours that are not gray."""
    rng = np.random.default_rng(seed)
    image = Image.linear_gradient("L").rotate(int(rng.integers(360))).resize((width, height))
    image = ImageOps.colorize(image, tuple(rng.integers(0, 90, 3)), tuple(rng.integers(150, 240, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, r = (int(rng.integers(*limits)) for limits in ((0, width), (0, height), (3, 10)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    image = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), float)
    return Image.fromarray(np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=["drawn", "cifar10"])
def photographs(request) -> np.ndarray:
    if request.param == "drawn":
        return np.stack([np.asarray(photograph(seed)) for seed in range(16)])
    data_dir = os.environ.get("TFDS_DATA_DIR")
    if not data_dir or not os.path.isdir(os.path.join(data_dir, "cifar10")):
        pytest.skip("TFDS_DATA_DIR is unset or has no cifar10")
    tfds = pytest.importorskip("tensorflow_datasets")
    examples = tfds.builder("cifar10", data_dir=data_dir).as_data_source(split="test[:64]")
    return np.stack([example["image"] for example in examples])


apply_jitted = jax.jit(apply_ops, static_argnames=("magnitude", "ops"))


def one_op(images: np.ndarray | jax.Array, op: str, magnitude: float) -> np.ndarray:
    drawn, sign = np.zeros(len(images), int), np.full(len(images), np.copysign(1, magnitude), np.float32)
    return np.asarray(apply_jitted(images, drawn, sign, magnitude=abs(magnitude), ops=(op,)))


def by_pillow(images: np.ndarray, function) -> np.ndarray:
    return np.stack([np.asarray(function(Image.fromarray(image))) for image in images])


def solarize_add(image: Image.Image, added: int) -> np.ndarray:
    pixels = np.asarray(image).astype(int)
    return np.where(pixels < 128, np.minimum(pixels + added, 255), pixels).astype(np.uint8)


EXACT = [
    ("equalize", 10, ImageOps.equalize),
    ("invert", 10, ImageOps.invert),
    ("posterize", 10, lambda image: ImageOps.posterize(image, 7)),
    ("posterize", -30, lambda image: ImageOps.posterize(image, 4)),
    ("solarize", -15, lambda image: ImageOps.solarize(image, 128)),
    ("solarize", 30, lambda image: ImageOps.solarize(image, 0)),
    ("solarize_add", 10, lambda image: solarize_add(image, 110)),
    ("solarize_add", -30, lambda image: solarize_add(image, 330)),
]
for name in ("brightness", "color", "contrast", "sharpness"):
    enhancer = getattr(ImageEnhance, name.capitalize())
    EXACT += [(name, 10, lambda image, enhancer=enhancer: enhancer(image).enhance(1.9))]
    # Not 15, which is a factor of 2.35: with the nearest float32, Pillow truncates 100 * 2.35 to 234.
    EXACT += [(name, 20, lambda image, enhancer=enhancer: enhancer(image).enhance(2.8))]
    EXACT += [(name, -5, lambda image, enhancer=enhancer: enhancer(image).enhance(0.55))]
    EXACT += [(name, -30, lambda image, enhancer=enhancer: enhancer(image).enhance(0.1))]


@pytest.mark.parametrize(("op", "magnitude", "function"), EXACT)
def test_op_equals_pillow(photographs, op, magnitude, function):
    expected = by_pillow(photographs, function)
    assert (expected != photographs).any()
    np.testing.assert_array_equal(one_op(photographs, op, magnitude), expected)


def test_auto_contrast_stretches_each_channel(photographs):
    faint = photographs // 3 + 40
    out = one_op(faint, "auto_contrast", 10)
    pixels = faint.astype(int)
    low, high = pixels.min((1, 2), keepdims=True), pixels.max((1, 2), keepdims=True)
    np.testing.assert_array_equal(out, (pixels - low) * 255 // (high - low))
    # Pillow multiplies by a rounded 255 / (high - low) and then truncates.
    assert np.abs(out.astype(int) - by_pillow(faint, ImageOps.autocontrast)).max() <= 1


@pytest.mark.parametrize("magnitude", [10, -4])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_shear_equals_pillow(photographs, axis, magnitude):
    slope = 0.03 * magnitude
    matrix = (1, slope, 0, 0, 1, 0) if axis == "x" else (1, 0, 0, slope, 1, 0)
    gray = (128, 128, 128)
    expected = by_pillow(
        photographs, lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=gray)
    )
    np.testing.assert_array_equal(one_op(photographs, f"shear_{axis}", magnitude), expected)


@pytest.mark.parametrize("magnitude", [10, -15, 25])
def test_rotate_equals_pillow(photographs, magnitude):
    expected = by_pillow(photographs, lambda image: image.rotate(-3 * magnitude, fillcolor=(128, 128, 128)))
    np.testing.assert_array_equal(one_op(photographs, "rotate", magnitude), expected)


def test_rotate_keeps_the_centre_of_an_oblong_image():
    image = photograph(0, width=40, height=24)
    expected = np.asarray(image.rotate(-30, fillcolor=(128, 128, 128)))
    np.testing.assert_array_equal(one_op(np.asarray(image)[None], "rotate", 10)[0], expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_translate_moves_by_a_share_of_the_side(photographs, sign):
    inner, outer = slice(18, None), slice(None, -18)  # 0.45 of 32 px is 14.4, but of 40 px 18 px
    photographs = np.pad(photographs[:4], ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    for axis, op in ((2, "translate_x"), (1, "translate_y")):
        moved = np.full_like(photographs, 128)
        to, start = (outer, inner) if sign > 0 else (inner, outer)
        where = (slice(None),) * axis
        moved[(*where, to)] = photographs[(*where, start)]
        np.testing.assert_array_equal(one_op(photographs, op, 10 * sign), moved)


@pytest.mark.slow
@pytest.mark.parametrize("op", RANDAUGMENT_OPS)
def test_magnitude_zero_changes_nothing_and_shapes_stay(op):
    for channels in (2, 3):
        images = np.random.default_rng(0).integers(0, 256, (3, 9, 12, channels), dtype=np.uint8)
        out = one_op(images, op, 0)
        assert out.shape == images.shape and out.dtype == np.uint8
        if op not in WITHOUT_MAGNITUDE:
            np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("op", ["equalize", "contrast", "brightness", "sharpness"])
def test_grayscale_equals_pillow(op):
    gray = photograph(3).convert("L")
    if op == "equalize":
        expected = ImageOps.equalize(gray)
    else:
        expected = getattr(ImageEnhance, op.capitalize())(gray).enhance(1.9)
    np.testing.assert_array_equal(one_op(np.asarray(gray)[None, :, :, None], op, 10)[0, :, :, 0], expected)


def test_flat_images_stay_flat():
    flat = np.full((2, 9, 12, 3), 77, np.uint8)
    for op in ("auto_contrast", "equalize", "contrast", "sharpness", "color"):
        np.testing.assert_array_equal(one_op(flat, op, 10), flat)


@pytest.mark.slow
def test_a_batch_gives_each_image_the_op_it_drew():
    images = np.stack([np.asarray(photograph(seed)) for seed in range(len(RANDAUGMENT_OPS))])
    sign = np.where(np.arange(len(images)) % 2, 1, -1).astype(np.float32)
    drawn = np.random.default_rng(0).permutation(len(images))
    together = apply_jitted(images, drawn, sign, magnitude=12.0, ops=tuple(RANDAUGMENT_OPS))
    for i, image in enumerate(images):
        alone = one_op(image[None], RANDAUGMENT_OPS[drawn[i]], 12 * sign[i])[0]
        np.testing.assert_array_equal(together[i], alone, err_msg=RANDAUGMENT_OPS[drawn[i]])


def test_ops_and_signs_are_drawn_evenly_for_each_image():
    images = jnp.tile(jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1), (400, 1, 1, 1))
    draw = jax.jit(randaugment, static_argnames=("layers", "ops", "magnitude"))
    out = np.asarray(draw(jax.random.key(0), images, layers=1, ops=("invert", "brightness"), magnitude=5.0))
    possible = [one_op(images[:1], op, m) for op, m in (("invert", 5), ("brightness", 5), ("brightness", -5))]
    kinds = [(out == image).all((1, 2, 3)).mean() for image in possible]
    np.testing.assert_allclose(kinds, [0.5, 0.25, 0.25], atol=0.08)
    assert sum(kinds) == pytest.approx(1)


def test_layers_follow_each_other():
    images = jnp.stack([jnp.asarray(photograph(seed)) for seed in range(4)])
    for layers, expected in ((2, images), (3, 255 - images)):
        out = randaugment(jax.random.key(0), images, layers=layers, ops=("invert",), magnitude=10.0)
        np.testing.assert_array_equal(out, expected)


def test_ops_left_out_cost_nothing():
    def compiled(*ops):
        images, zeros = jnp.zeros((2, 8, 8, 3), jnp.uint8), jnp.zeros(2)
        layer = jax.jit(partial(apply_ops, magnitude=1.0, ops=ops)).lower(images, zeros.astype(int), zeros)
        return layer.as_text(), layer.compile().as_text()

    for with_it, without, operation in (
        (("equalize", "invert"), ("invert", "posterize"), "stablehlo.scatter"),
        (("shear_x",), ("color", "sharpness"), "stablehlo.gather"),
    ):
        assert operation in compiled(*with_it)[0] and operation not in compiled(*without)[0]
    assert compiled("invert")[1].count(" conditional(") == 1


def test_the_table_and_the_config_name_the_same_ops():
    assert sorted(op for _, kind in _PASSES for op in kind) == sorted(RANDAUGMENT_OPS)
    check_ops(RANDAUGMENT_OPS)


def test_an_empty_list_of_ops_is_refused_with_the_names():
    with pytest.raises(
        UserError, match="augment.randaugment_ops is empty: .*randaugment_layers to 0"
    ) as error:
        check_ops([])
    for op in RANDAUGMENT_OPS:
        assert op in str(error.value)


def test_ops_may_occur_several_times_but_not_so_often_that_compiling_takes_minutes():
    check_ops([*RANDAUGMENT_OPS, "rotate"])
    with pytest.raises(UserError, match="randaugment_ops has 15,000 ops, which .*: give at most 100"):
        check_ops(RANDAUGMENT_OPS * 1000)


def test_an_unknown_op_is_refused_with_the_nearest_name():
    images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    words = "augment.randaugment_ops has an unknown op 'posterise': did you mean 'posterize'"
    with pytest.raises(UserError, match=words):
        randaugment(jax.random.key(0), images, layers=1, ops=("invert", "posterise"), magnitude=10.0)
