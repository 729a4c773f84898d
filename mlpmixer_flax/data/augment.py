"""Turns uint8 pixels into the model's input: with augmentation in training, without it everywhere else.

These are pure functions that run inside the jitted update, on the device that holds the batch. Images are
(n, h, w, c) with any number of channels; every image of a batch has its own random draws. Options are Python
values, and an option that is off is not traced.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlpmixer_flax import UserError
from mlpmixer_flax.data.randaugment import randaugment


@jax.named_scope("augment")  # its name in profiles and in the compiler's output
def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    preprocess: Mapping[str, Any],
    cropped: bool = False,
    crop_padding_px: int = 0,
    min_crop_area: float = 1.0,
    flip: bool = False,
    randaugment_layers: int = 0,
    randaugment_ops: Sequence[str] = (),
    randaugment_magnitude: float = 10.0,
    erase_probability: float = 0.0,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    mix_probability: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns augmented training images for the model and label distributions for the loss.

    Arguments that are not listed here are the keys of `config.augment`.

    Args:
      key: of this update.
      images: uint8 (n, h, w, c).
      labels: int32 (n,), or uint8 (n, num_classes) with 1 for each of several labels.
      num_classes: the length of a label distribution.
      preprocess: `config.preprocess`; its crop_fraction is used at test time only.
      cropped: `Examples.cropped`; if True, the host has cropped already and `min_crop_area` is ignored.

    Returns:
      Images float32 (n, size, size, c) and label distributions float32 (n, num_classes).

    Raises:
      UserError: the images are not uint8.
    """
    _check_levels(images)
    # The number of keys is constant, so turning on one operation does not change the draws of another.
    crop_key, area_key, flip_key, op_key, erase_key, mix_key = jax.random.split(key, 6)
    size_px, interpolation = preprocess["image_size_px"], preprocess["interpolation"]
    if crop_padding_px:
        images = random_crop(crop_key, images, padding_px=crop_padding_px)
    if min_crop_area < 1 and not cropped:
        images = random_resized_crop(
            area_key, images, size_px=size_px, min_area=min_crop_area, interpolation=interpolation
        )
    if flip:
        images = random_flip(flip_key, images)
    if randaugment_layers:
        images = randaugment(
            op_key,
            images,
            layers=randaugment_layers,
            ops=randaugment_ops,
            magnitude=randaugment_magnitude,
        )
    # After RandAugment, so that its ops process few pixels if the images are small.
    images = resize(images, size_px, interpolation)
    images = normalize(images, mean=preprocess["mean"], std=preprocess["std"])
    if erase_probability:
        images = random_erase(erase_key, images, probability=erase_probability)
    if labels.ndim == 1:
        labels = smooth_labels(labels, num_classes, smoothing=label_smoothing)
    else:  # there is no smoothing, as `validate.check_labels` says
        labels = labels.astype(jnp.float32)
    if (mixup_alpha or cutmix_alpha) and mix_probability:
        mask = mix_mask(
            mix_key,
            images.shape,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            probability=mix_probability,
        )
        images, labels = mix(images, labels, mask=mask)
    return images, labels


def prepare(
    images: jax.Array,
    *,
    cropped: bool = False,
    image_size_px: int,
    crop_fraction: float,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
    fit: str = "crop",
) -> jax.Array:
    """Returns the model's input at test time: uint8 (n, h, w, c) -> float32 (n, size, size, c).

    Arguments that are not listed here are the keys of `config.preprocess`.

    Args:
      images: uint8 (n, h, w, c).
      cropped: `Examples.cropped`; if True, the host has cropped already and `crop_fraction` is ignored.
      fit: is ignored, because images that are not square become squares on the host.

    Raises:
      UserError: the images are not uint8.
    """
    _check_levels(images)
    if not cropped:
        images = central_crop(images, crop_fraction)
    images = resize(images, image_size_px, interpolation)
    return normalize(images, mean=mean, std=std)


def _check_levels(images: jax.Array) -> None:
    # Floats from 0 to 1 would be taken for levels from 0 to 255: almost black, and another class.
    if images.dtype != jnp.uint8:
        hint = ", for example (255 * images).round().astype('uint8')" if images.dtype.kind == "f" else ""
        raise UserError(f"the images are {images.dtype}, not uint8: give levels from 0 to 255 as uint8{hint}")


def central_crop(images: jax.Array, fraction: float) -> jax.Array:
    """Returns the middle of images (n, h, w, c): `fraction` of each side, rounded to whole pixels."""
    h, w = images.shape[1:3]
    height, width = max(round(h * fraction), 1), max(round(w * fraction), 1)
    top, left = (h - height) // 2, (w - width) // 2
    return images[:, top : top + height, left : left + width]


def resize(images: jax.Array, size_px: int, interpolation: str) -> jax.Array:
    """Resizes images (n, h, w, c) to (n, size_px, size_px, c), like Pillow's "bilinear" or "bicubic".

    The result is float32, not rounded; shrinking is antialiased. Images of this size are returned unchanged.
    """
    n, h, w, c = images.shape
    if (h, w) == (size_px, size_px):
        return images
    # Clipped because the bicubic kernel overshoots at edges.
    resized = jax.image.resize(images.astype(jnp.float32), (n, size_px, size_px, c), interpolation)
    return jnp.clip(resized, 0, 255)


def normalize(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (images / 255 - mean) / std in float32, of images (n, h, w, c).

    `mean` and `std` have one value, or one per channel.
    """
    return (images.astype(jnp.float32) / 255 - _per_channel(mean)) / _per_channel(std)


def denormalize(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverts `normalize` for display: returns uint8, rounded, with noise clipped to 0 and 255."""
    levels = (images * _per_channel(std) + _per_channel(mean)) * 255
    return jnp.clip(jnp.round(levels), 0, 255).astype(jnp.uint8)


def _per_channel(values: Sequence[float]) -> jax.Array:
    """Returns values as an array of the rank of images, as jax_numpy_rank_promotion="raise" wants it."""
    return jnp.asarray(values, jnp.float32)[None, None, None]


def random_crop(key: jax.Array, images: jax.Array, *, padding_px: int) -> jax.Array:
    """Pads images (n, h, w, c) with zeros and crops a random window of the original size (He et al. 2016)."""
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (padding_px, padding_px), (padding_px, padding_px), (0, 0)))
    corner = jax.random.randint(key, (n, 2), 0, 2 * padding_px + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (h, w, c)))(padded, corner)


def random_resized_crop(
    key: jax.Array, images: jax.Array, *, size_px: int, min_area: float, interpolation: str
) -> jax.Array:
    """Crops a box of random area and shape and resizes it: the Inception crop (Szegedy et al. 2015).

    uint8 (n, h, w, c) -> uint8 (n, size_px, size_px, c). The share of the area is uniform from `min_area` to
    1, the aspect ratio is log-uniform from 3/4 to 4/3. If a box would not fit in the image, its aspect ratio
    is changed.
    """
    n, h, w, c = images.shape
    area_key, ratio_key, corner_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (n,), minval=min_area)
    ratio = jnp.exp(jax.random.uniform(ratio_key, (n,), minval=math.log(3 / 4), maxval=math.log(4 / 3)))
    ratio = jnp.clip(ratio, area * w / h, w / h / area)
    side = jnp.stack([jnp.sqrt(area * h * w / ratio), jnp.sqrt(area * h * w * ratio)], axis=-1)
    corner = jax.random.uniform(corner_key, (n, 2)) * (jnp.array([h, w]) - side)

    def crop(image: jax.Array, side: jax.Array, corner: jax.Array) -> jax.Array:
        scale, shape = size_px / side, (size_px, size_px, c)
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, -corner * scale, interpolation)

    # One kernel of a fixed shape crops and resizes. Then back to uint8, because RandAugment may follow.
    crops = jax.vmap(crop)(images.astype(jnp.float32), side, corner)
    return jnp.clip(jnp.round(crops), 0, 255).astype(jnp.uint8)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of (n, h, w, c) left to right with probability 0.5."""
    flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_erase(key: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Replaces a rectangle of normalised images by normal noise (Zhong et al. 2017, arXiv 1708.04896).

    The share of the area is uniform from 2% to a third, the aspect ratio is log-uniform from 0.3 to 1 / 0.3.
    Sides are at most as long as those of the image. `probability` is the chance of each image to be changed.
    """
    n, h, w, _ = images.shape
    erased_key, area_key, ratio_key, corner_key, noise_key = jax.random.split(key, 5)
    erased = jax.random.bernoulli(erased_key, probability, (n, 1, 1, 1))
    area = jax.random.uniform(area_key, (n,), minval=0.02, maxval=1 / 3) * h * w
    ratio = jnp.exp(jax.random.uniform(ratio_key, (n,), minval=math.log(0.3), maxval=-math.log(0.3)))
    limit = jnp.array([h, w])
    side = jnp.round(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=-1)).astype(jnp.int32)
    side = jnp.clip(side, 1, limit)
    corner = jax.random.randint(corner_key, (n, 2), 0, limit - side + 1)
    noise = jax.random.normal(noise_key, images.shape)
    return jnp.where(erased & _rectangles(corner, corner + side, h, w), noise, images)


def smooth_labels(labels: jax.Array, num_classes: int, *, smoothing: float = 0.0) -> jax.Array:
    """Returns label distributions, int32 (n,) -> float32 (n, num_classes).

    Each is one-hot, with a share `smoothing` of it spread evenly over all classes.
    """
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def symmetric_beta(key: jax.Array, alpha: float, shape: Sequence[int]) -> jax.Array:
    """Draws from Beta(alpha, alpha), float32; exact for every alpha above 0.

    It is the formula of Devroye (Random variate generation in one line of code, 1996), which has no loop.
    `jax.random.beta` rejects samples in a loop, and takes seconds to compile.
    """
    u, v = jax.random.uniform(key, (2, *shape))
    q, c = u ** (1 / alpha), jnp.cos(2 * jnp.pi * v)
    return jnp.clip(
        0.5 + 0.5 * c * jnp.sqrt((1 - q) / (q + (1 - q) * c**2)), 0, 1
    )  # rounding may leave [0, 1]


def mixup_mask(key: jax.Array, shape: Sequence[int], *, alpha: float) -> jax.Array:
    """Draws one weight per image from Beta(alpha, alpha): (n, 1, 1, 1) for `shape` (arXiv 1710.09412)."""
    return symmetric_beta(key, alpha, (shape[0], 1, 1, 1))


def cutmix_mask(key: jax.Array, shape: Sequence[int], *, alpha: float) -> jax.Array:
    """Draws 0 in a rectangle, 1 around it: float32 (n, h, w, 1) for images of `shape` (arXiv 1905.04899).

    The rectangle has the aspect ratio of the image. Its share of the area is 1 - Beta(alpha, alpha), minus
    the part outside the image.
    """
    n, h, w, _ = shape
    area_key, centre_key = jax.random.split(key)
    limit = jnp.array([h, w])
    side = jnp.sqrt(1 - symmetric_beta(area_key, alpha, (n, 1))) * limit
    corner = jax.random.randint(centre_key, (n, 2), 0, limit) - side.astype(jnp.int32) // 2
    return 1.0 - _rectangles(corner, corner + side.astype(jnp.int32), h, w)


def mix_mask(
    key: jax.Array, shape: Sequence[int], *, mixup_alpha: float, cutmix_alpha: float, probability: float = 1.0
) -> jax.Array:
    """Draws the weight of each pixel in a mix of two images: by mixup or CutMix, at random if both are on.

    float32, broadcasts to (n, h, w, 1). Images are mixed with `probability`; for the others the weight is 1.
    """
    mixed_key, kind_key, mixup_key, cutmix_key = jax.random.split(key, 4)
    if not cutmix_alpha:
        mask = mixup_mask(mixup_key, shape, alpha=mixup_alpha)
    elif not mixup_alpha:
        mask = cutmix_mask(cutmix_key, shape, alpha=cutmix_alpha)
    else:
        mask = jnp.where(
            jax.random.bernoulli(kind_key, 0.5, (shape[0], 1, 1, 1)),
            mixup_mask(mixup_key, shape, alpha=mixup_alpha),
            cutmix_mask(cutmix_key, shape, alpha=cutmix_alpha),
        )
    return jnp.where(jax.random.bernoulli(mixed_key, probability, (shape[0], 1, 1, 1)), mask, 1.0)


def mix(images: jax.Array, labels: jax.Array, *, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blends each image and label distribution with the previous one in the batch, in the same proportion."""
    share = mask.mean((1, 2, 3))[:, None]
    images = mask * images + (1 - mask) * jnp.roll(images, 1, axis=0)
    return images, share * labels + (1 - share) * jnp.roll(labels, 1, axis=0)


def _rectangles(first: jax.Array, last: jax.Array, h: int, w: int) -> jax.Array:
    """Returns bool (n, h, w, 1), True between corners (n, 2), given as (y, x); the last is exclusive."""
    y, x = jnp.arange(h)[:, None, None], jnp.arange(w)[:, None]
    first, last = first[:, None, None, None], last[:, None, None, None]
    return (first[..., 0] <= y) & (y < last[..., 0]) & (first[..., 1] <= x) & (x < last[..., 1])
