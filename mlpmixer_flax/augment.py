"""From uint8 pixels to the model's input: augmentation in training, the plain path ever after.

Pure functions that run inside the jitted step, on the device that holds the batch. Images are (n, h, w, c)
with any number of channels; every image of a batch draws its own randomness. Knobs are Python values, and
what is off isn't traced.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mlpmixer_flax.randaugment import randaugment


def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    preprocess: Mapping[str, Any],
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
    """Training images and labels as the model and the loss take them; the knobs are `config.augment`.

    Takes images uint8 (n, h, w, c), labels int32 (n,) and `config.preprocess`, whose crop_fraction is for
    test time only. Returns images float32 (n, size, size, c), label distributions float32 (n, num_classes).
    """
    # Always as many keys: switching one operation on changes the draws of no other.
    crop_key, area_key, flip_key, op_key, erase_key, mix_key = jax.random.split(key, 6)
    size_px, interpolation = preprocess["image_size_px"], preprocess["interpolation"]
    if crop_padding_px:
        images = random_crop(crop_key, images, padding_px=crop_padding_px)
    if min_crop_area < 1:
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
    # After RandAugment, so that its ops see a small image as few pixels.
    images = resize(images, size_px, interpolation)
    images = normalize(images, mean=preprocess["mean"], std=preprocess["std"])
    if erase_probability:
        images = random_erase(erase_key, images, probability=erase_probability)
    labels = smooth_labels(labels, num_classes, label_smoothing)
    if (mixup_alpha or cutmix_alpha) and mix_probability:
        mask = mix_mask(
            mix_key,
            images.shape,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            probability=mix_probability,
        )
        images, labels = mix(images, labels, mask)
    return images, labels


def prepare(
    images: jax.Array,
    *,
    image_size_px: int,
    crop_fraction: float,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """Test-time path by the keys of `config.preprocess`: uint8 (n, h, w, c) -> float32 (n, size, size, c)."""
    images = resize(central_crop(images, crop_fraction), image_size_px, interpolation)
    return normalize(images, mean=mean, std=std)


def central_crop(images: jax.Array, fraction: float) -> jax.Array:
    """The middle of (n, h, w, c), keeping `fraction` of each side, to the nearest pixel."""
    h, w = images.shape[1:3]
    height, width = max(round(h * fraction), 1), max(round(w * fraction), 1)
    top, left = (h - height) // 2, (w - width) // 2
    return images[:, top : top + height, left : left + width]


def resize(images: jax.Array, size_px: int, interpolation: str) -> jax.Array:
    """(n, h, w, c) -> (n, size_px, size_px, c); as Pillow's "bilinear" or "bicubic", but float32, unrounded.

    Antialiased where it shrinks. Images of that size already come back as they are.
    """
    n, h, w, c = images.shape
    if (h, w) == (size_px, size_px):
        return images
    # Clipped because the cubic kernel overshoots at edges.
    resized = jax.image.resize(images.astype(jnp.float32), (n, size_px, size_px, c), interpolation)
    return jnp.clip(resized, 0, 255)


def normalize(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Levels 0 to 255 -> float32 (pixel / 255 - mean) / std; mean and std: one value, or one per channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def denormalize(images: jax.Array, *, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """The inverse of `normalize`, to be looked at: -> uint8, rounded, and cut off where noise is beyond it."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return jnp.clip(jnp.round((images * std + mean) * 255), 0, 255).astype(jnp.uint8)


def random_crop(key: jax.Array, images: jax.Array, *, padding_px: int) -> jax.Array:
    """A window of the size of (n, h, w, c) out of the image with zeros around it (He et al. 2016)."""
    n, h, w, c = images.shape
    padded = jnp.pad(images, ((0, 0), (padding_px, padding_px), (padding_px, padding_px), (0, 0)))
    corner = jax.random.randint(key, (n, 2), 0, 2 * padding_px + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (h, w, c)))(padded, corner)


def random_resized_crop(
    key: jax.Array, images: jax.Array, *, size_px: int, min_area: float, interpolation: str
) -> jax.Array:
    """A box of random area and shape, enlarged or shrunk to size_px: Inception crop (Szegedy et al. 2015).

    uint8 (n, h, w, c) -> uint8 (n, size_px, size_px, c). The share of the area is uniform from min_area to 1,
    the aspect ratio log-uniform from 3/4 to 4/3. Where a box would stick out, its ratio gives way.
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

    # One kernel of a fixed shape crops and resizes; levels again, because RandAugment may follow.
    crops = jax.vmap(crop)(images.astype(jnp.float32), side, corner)
    return jnp.clip(jnp.round(crops), 0, 255).astype(jnp.uint8)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each of (n, h, w, c) left-right half the time."""
    flipped = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_erase(key: jax.Array, images: jax.Array, *, probability: float) -> jax.Array:
    """Turns a rectangle of normalised images into normal noise (Zhong et al. 2017, arXiv 1708.04896).

    Area uniform from 2% to a third, aspect ratio log-uniform from 0.3 to 1 / 0.3, no longer than the image.
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


def smooth_labels(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """int32 (n,) -> float32 (n, num_classes): one-hot, a share of it spread evenly over all the classes."""
    return (1 - smoothing) * jax.nn.one_hot(labels, num_classes) + smoothing / num_classes


def mixup_mask(key: jax.Array, shape: Sequence[int], alpha: float) -> jax.Array:
    """Weights Beta(alpha, alpha), one per image: (n, 1, 1, 1) for images of `shape` (arXiv 1710.09412)."""
    return jax.random.beta(key, alpha, alpha, (shape[0], 1, 1, 1))


def cutmix_mask(key: jax.Array, shape: Sequence[int], alpha: float) -> jax.Array:
    """0 in a rectangle, 1 around it: float32 (n, h, w, 1) for images of `shape` (arXiv 1905.04899).

    The rectangle is shaped like the image, its area 1 - Beta(alpha, alpha) less what its place cuts off.
    """
    n, h, w, _ = shape
    area_key, centre_key = jax.random.split(key)
    limit = jnp.array([h, w])
    side = jnp.sqrt(1 - jax.random.beta(area_key, alpha, alpha, (n, 1))) * limit
    corner = jax.random.randint(centre_key, (n, 2), 0, limit) - side.astype(jnp.int32) // 2
    return 1.0 - _rectangles(corner, corner + side.astype(jnp.int32), h, w)


def mix_mask(
    key: jax.Array, shape: Sequence[int], *, mixup_alpha: float, cutmix_alpha: float, probability: float = 1.0
) -> jax.Array:
    """The share that each pixel keeps of itself: from mixup, CutMix, or one of them at random if both are on.

    float32, broadcasts to (n, h, w, 1); 1 for the images, 1 - probability of them, that stay unmixed.
    """
    mixed_key, kind_key, mixup_key, cutmix_key = jax.random.split(key, 4)
    if not cutmix_alpha:
        mask = mixup_mask(mixup_key, shape, mixup_alpha)
    elif not mixup_alpha:
        mask = cutmix_mask(cutmix_key, shape, cutmix_alpha)
    else:
        mask = jnp.where(
            jax.random.bernoulli(kind_key, 0.5, (shape[0], 1, 1, 1)),
            mixup_mask(mixup_key, shape, mixup_alpha),
            cutmix_mask(cutmix_key, shape, cutmix_alpha),
        )
    return jnp.where(jax.random.bernoulli(mixed_key, probability, (shape[0], 1, 1, 1)), mask, 1.0)


def mix(images: jax.Array, labels: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blends images and label distributions with those before them in the batch, in the same proportion."""
    share = mask.mean((1, 2, 3))[:, None]
    images = mask * images + (1 - mask) * jnp.roll(images, 1, axis=0)
    return images, share * labels + (1 - share) * jnp.roll(labels, 1, axis=0)


def _rectangles(first: jax.Array, last: jax.Array, h: int, w: int) -> jax.Array:
    """Corners (n, 2) as (y, x), the last exclusive -> bool (n, h, w, 1), True inside."""
    y, x = jnp.arange(h)[:, None, None], jnp.arange(w)[:, None]
    first, last = first[:, None, None, None], last[:, None, None, None]
    return (first[..., 0] <= y) & (y < last[..., 0]) & (first[..., 1] <= x) & (x < last[..., 1])
