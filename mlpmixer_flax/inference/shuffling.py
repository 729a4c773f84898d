"""Shuffles images, in the same random order for every image, and weights to match (paper, §3.4).

A Mixer learns as well from images with shuffled patches, and shuffled pixels inside each patch, as from the
original images; but not if all pixels are shuffled. The functions take and return NumPy or JAX arrays.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax.dataloader import iterate
from mlpmixer_flax.inference.forward import check_finite
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.models import check_patch
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.evaluation import evaluate
from mlpmixer_flax.training.report import Recent
from mlpmixer_flax.training.setup import Setup, start_state


def shuffle_patches(images: Any, *, patch_px: tuple[int, int], seed: int) -> Any:
    """Returns images (n, h, w, c) with patches in a random order, and the pixels of each patch in another one.

    Raises:
      UserError: patches of `patch_px` (height, width) do not divide the image.
    """
    n, h, w, c = images.shape
    check_patch(patch_px, (h, w))
    (height, width), (rows, columns) = patch_px, (h // patch_px[0], w // patch_px[1])
    patch_order, pixel_order = _orders(rows * columns, height * width, seed)
    patches = images.reshape(n, rows, height, columns, width, c).swapaxes(2, 3)
    patches = patches.reshape(n, rows * columns, height * width, c)[:, patch_order][:, :, pixel_order]
    return patches.reshape(n, rows, columns, height, width, c).swapaxes(2, 3).reshape(n, h, w, c)


def shuffle_pixels(images: Any, *, seed: int) -> Any:
    """Returns images (n, h, w, c) with all pixels in a random order."""
    n, h, w, c = images.shape
    order = np.random.default_rng(seed).permutation(h * w)
    return images.reshape(n, h * w, c)[:, order].reshape(n, h, w, c)


def shuffle_weights(params: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Returns parameters whose logits for shuffled images are those of `params` for the original images.

    The seed is that of `shuffle_patches`. Logits are equal except for rounding.
    """
    kernel = params["stem"]["kernel"]
    height, width, channels, hidden_dim = kernel.shape
    tokens = params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"].shape[0]
    patch_order, pixel_order = _orders(tokens, height * width, seed)
    pixels = kernel.reshape(height * width, channels, hidden_dim)[pixel_order]
    shuffled = {**params, "stem": {**params["stem"], "kernel": pixels.reshape(kernel.shape)}}
    for name in params:
        if name.startswith("MixerBlock_"):
            first, second = (params[name]["token_mixing"][layer] for layer in ("Dense_0", "Dense_1"))
            # Tokens are the rows of the first kernel, and the columns and biases of the second layer.
            token_mixing = {
                "Dense_0": {**first, "kernel": first["kernel"][patch_order]},
                "Dense_1": {
                    "kernel": second["kernel"][:, patch_order],
                    "bias": second["bias"][patch_order],
                },
            }
            shuffled[name] = {**params[name], "token_mixing": token_mixing}
    return shuffled


def seeing(function: Callable, shuffle: Callable[[Any], Any]) -> Callable:
    """Returns `function`, such as a training step, with every model inside applied to `shuffle(images)`.

    So images are shuffled after all augmentation, and crops and flips are those of the original image.
    """

    def intercept(call, args, kwargs, context):
        if context.module.path == () and context.method_name == "__call__":
            args = (shuffle(args[0]), *args[1:])
        return call(*args, **kwargs)

    def shuffled(*args):
        with nn.intercept_methods(intercept):
            return function(*args)

    return shuffled


def symmetry(model: Model, *, seed: int = 0) -> tuple[float, float]:
    """Returns (largest logit, largest change of a logit) if patches and weights are shuffled in the same way.

    The images are random.

    Raises:
      UserError: as `check_finite`.
    """
    size_px, patch_px = model.preprocess["image_size_px"], model.module.patches["size"]
    shape = (8, size_px, size_px, model.channels)
    images = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    module = model.module.clone(dtype="float32")
    with jax.default_matmul_precision("highest"):  # the default of GPUs and TPUs has fewer digits
        apply = jax.jit(lambda params, images: module.apply({"params": params}, images))
        logits = apply(model.params, images)
        check_finite({"logits": logits})
        shuffled = apply(
            shuffle_weights(model.params, seed=seed), shuffle_patches(images, patch_px=patch_px, seed=seed)
        )
    return float(abs(logits).max()), float(abs(shuffled - logits).max())


def learn(setup: Setup, shuffle: Callable[[Any], Any]) -> list[dict[str, float]]:
    """Trains from random weights on images changed by `shuffle`; returns one row per evaluation.

    The rows are those of a metrics.jsonl; nothing is written.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    config, intervals = setup.config, setup.intervals
    everywhere = sharding.replicated(setup.mesh)
    placements = (setup.placements, everywhere)
    update = jax.jit(seeing(setup.update, shuffle), donate_argnums=0, out_shardings=placements)
    score = jax.jit(seeing(setup.eval_step, shuffle), out_shardings=everywhere)
    state = start_state(setup, None)
    recent, rows = Recent(config.batch_size, []), []
    batches = iterate(setup.train_batches, 0, intervals.total_steps, num_workers=config.num_workers)
    bar = tqdm(batches, "training", intervals.total_steps, delay=2, leave=False, disable=None)
    with contextlib.closing(batches):
        for step, batch in enumerate(bar, 1):
            state, metrics = update(state, sharding.put_batch(batch, setup.mesh))
            recent.add(step, metrics)
            if intervals.evaluate(step):
                tests = iterate(
                    setup.test_batches, 0, len(setup.test_batches), num_workers=config.num_workers
                )
                with contextlib.closing(tests):
                    scores = evaluate(score, state.eval_params, tests, mesh=setup.mesh)
                scored = {f"{setup.scored}/{key}": value for key, value in scores.items()}
                rows.append({"step": step, **recent.summary(), **scored})
    return rows


def _orders(num_patches: int, num_pixels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(num_patches), rng.permutation(num_pixels)
