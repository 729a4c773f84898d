"""Images with their pixels in another order, the same for every image, and the weights that do not notice.

The paper's §3.4: a Mixer learns as well from shuffled patches with shuffled pixels as from the originals, but
not from pixels shuffled over the whole image. The functions take and give NumPy or JAX arrays.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError, sharding
from mlpmixer_flax.dataloader import iterate
from mlpmixer_flax.evaluate import evaluate
from mlpmixer_flax.metrics import Recent
from mlpmixer_flax.plan import Plan
from mlpmixer_flax.trained import Trained


def shuffle_patches(images: Any, *, patch_px: tuple[int, int], seed: int) -> Any:
    """Images (n, h, w, c) with their patches in a random order, and the pixels of all patches in another one.

    Raises UserError where patches of (height, width) don't divide the image.
    """
    n, h, w, c = images.shape
    (height, width), (rows, columns) = patch_px, (h // patch_px[0], w // patch_px[1])
    if (rows * height, columns * width) != (h, w):
        raise UserError(
            f"a patch of {height}x{width} px does not divide an image of {h}x{w} px: choose another"
        )
    patch_order, pixel_order = _orders(rows * columns, height * width, seed)
    patches = images.reshape(n, rows, height, columns, width, c).swapaxes(2, 3)
    patches = patches.reshape(n, rows * columns, height * width, c)[:, patch_order][:, :, pixel_order]
    return patches.reshape(n, rows, columns, height, width, c).swapaxes(2, 3).reshape(n, h, w, c)


def shuffle_pixels(images: Any, *, seed: int) -> Any:
    """Images (n, h, w, c) with all their pixels in a random order."""
    n, h, w, c = images.shape
    order = np.random.default_rng(seed).permutation(h * w)
    return images.reshape(n, h * w, c)[:, order].reshape(n, h, w, c)


def shuffle_weights(params: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """The parameters of an MlpMixer that see in images of `shuffle_patches` what `params` see in the originals.

    The seed is that of the images. The logits are the same but for rounding.
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
            # The tokens are the rows of the way in, and the columns and biases of the way out.
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
    """`function`, such as a training step, in which every model sees `shuffle(images)` instead of images.

    So they are shuffled after all augmentation: a crop or a flip of the image remains one.
    """

    def intercept(call, args, kwargs, context):
        if context.module.path == () and context.method_name == "__call__":
            args = (shuffle(args[0]), *args[1:])
        return call(*args, **kwargs)

    def shuffled(*args):
        with nn.intercept_methods(intercept):
            return function(*args)

    return shuffled


def symmetry(trained: Trained, *, seed: int = 0) -> tuple[float, float]:
    """(largest logit, largest difference to it where patches and weights are shuffled alike), of random images."""
    size_px, patch_px = trained.preprocess["image_size_px"], trained.model.patches["size"]
    shape = (8, size_px, size_px, trained.channels)
    images = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
    model = trained.model.clone(dtype="float32")
    with jax.default_matmul_precision("highest"):  # or a GPU and a TPU round to fewer digits
        apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
        logits = apply(trained.params, images)
        shuffled = apply(
            shuffle_weights(trained.params, seed=seed), shuffle_patches(images, patch_px=patch_px, seed=seed)
        )
    return float(abs(logits).max()), float(abs(shuffled - logits).max())


def learn(plan: Plan, shuffle: Callable[[Any], Any]) -> list[dict[str, float]]:
    """Trains from random weights on images that `shuffle` has changed; returns the rows of a metrics.jsonl.

    There is one for each test. Raises FloatingPointError when the loss is no longer finite.
    """
    config, everywhere = plan.config, sharding.replicated(plan.mesh)
    update = jax.jit(seeing(plan.update, shuffle), donate_argnums=0, out_shardings=everywhere)
    score = jax.jit(seeing(plan.score, shuffle), out_shardings=everywhere)
    state = jax.jit(plan.init, out_shardings=everywhere)(None)
    recent, rows = Recent(config.batch_size), []
    batches = iterate(plan.train_batches, 0, plan.total_steps, num_workers=config.num_workers)
    bar = tqdm(batches, "training", plan.total_steps, delay=2, leave=False, disable=None)
    with contextlib.closing(batches):
        for step, batch in enumerate(bar, 1):
            state, metrics = update(state, sharding.put_batch(batch, plan.mesh))
            recent.add(step, metrics)
            if step == plan.total_steps or (plan.eval_every and step % plan.eval_every == 0):
                tests = iterate(plan.test_batches, 0, len(plan.test_batches), num_workers=config.num_workers)
                with contextlib.closing(tests):
                    scores = evaluate(score, state.eval_params, tests, mesh=plan.mesh)
                tested = {f"test/{key}": value for key, value in scores.items()}
                rows.append({"step": step, **recent.summary(), **tested})
    return rows


def _orders(num_patches: int, num_pixels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(num_patches), rng.permutation(num_pixels)
