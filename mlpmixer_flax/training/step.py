"""Defines the update of a run: the state, how it starts, and the function that changes it."""

from collections.abc import Callable, Mapping
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.data import augment
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import Params, split_frozen

DeviceBatch = Mapping[str, jax.Array]  # image: uint8 (n, h, w, c), label: int32 (n,), mask: bool (n,)


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes during a run; the content of a checkpoint."""

    step: jax.Array  # int32 (), completed updates
    params: Params
    opt_state: optax.OptState  # only for the parameters that learn
    ema: Params | None  # moving average of the parameters; None if config.ema_decay is 0

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the EMA if there is one."""
        return self.params if self.ema is None else self.ema


Metrics = dict[str, jax.Array]  # float32 scalars
TrainStep = Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]
PreviewStep = Callable[[DeviceBatch], jax.Array]


def init_state(
    params: Params | None,
    *,
    model: MlpMixer,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """Returns the state before the first update, with random parameters if `params` is None.

    `image_shape` is (height, width, channels) of the model's input.
    """
    if params is None:
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, *image_shape)))["params"]
    # A copy, because the buffers of the whole state are donated to the update, and none may be donated twice.
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    learning, _ = split_frozen(params, config.freeze)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(learning), ema)


def make_train_step(
    model: MlpMixer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    *,
    cropped: bool = False,
) -> TrainStep:
    """Returns the update: (state, batch) -> (state, metrics).

    Metrics are loss and accuracy before the update (compared with the augmented labels), global norms of the
    gradient and of the updated parameters (only of those that learn), and the learning rate. All randomness
    is a function of the config's seed and the step, so nothing random is stored. `cropped` is
    `Examples.cropped`: True if the host has cropped the images already.

    If `optimizer.sam_rho` is above 0, the gradient is computed at parameters that are moved uphill by this
    distance (SAM, arXiv 2010.01412). The direction uphill comes from the whole batch, with the same
    augmentation and dropout.
    """

    def loss_fn(learning, frozen, images, labels, key):
        params = {**learning, **frozen}
        logits = cast(jax.Array, model.apply({"params": params}, images, train=True, rngs={"dropout": key}))
        correct = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        return LOSSES[config.loss].per_image(logits, labels).mean(), correct.mean()

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        images, labels, dropout_key = _augmented(
            state.step, batch, config=config, num_classes=model.num_classes, cropped=cropped
        )
        learning, frozen = split_frozen(state.params, config.freeze)

        def gradient_at(learning):
            return _mean_gradient(
                loss_fn, learning, frozen, images, labels, dropout_key, microbatches=config.accumulation_steps
            )

        (loss, accuracy), grads = gradient_at(learning)
        rho = config.optimizer.sam_rho
        if rho:
            uphill = optax.tree.scale(rho / (optax.tree.norm(grads) + 1e-12), grads)
            _, grads = gradient_at(optax.tree.add(learning, uphill))
        updates, opt_state = optimizer.update(grads, state.opt_state, learning)
        learning = cast(Params, optax.apply_updates(learning, updates))
        params = {name: learning.get(name, layer) for name, layer in state.params.items()}
        ema = state.ema
        if ema is not None:
            # At first the average is over few updates, so that it forgets the start, like TensorFlow's EMA.
            decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1.0 - decay)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(learning),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def make_preview_step(config: ConfigDict, *, num_classes: int, cropped: bool = False) -> PreviewStep:
    """Returns a function: first batch -> up to 64 of its images as the first update sees them.

    They are augmented, uint8 (n, size, size, c). `cropped` is `Examples.cropped`.
    """

    def preview_step(batch: DeviceBatch) -> jax.Array:
        images, _, _ = _augmented(0, batch, config=config, num_classes=num_classes, cropped=cropped)
        return augment.denormalize(images[:64], mean=config.preprocess.mean, std=config.preprocess.std)

    return preview_step


def _augmented(step, batch, *, config, num_classes, cropped):
    """Returns (images, label distributions, key for dropout) of the update that follows `step`."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    images, labels = augment.augment(
        augment_key,
        batch["image"],
        batch["label"],
        num_classes=num_classes,
        preprocess=config.preprocess.to_dict(),
        cropped=cropped,
        **dict(config.augment),
    )
    return images, labels, dropout_key


def _mean_gradient(loss_fn, params, frozen, images, labels, key, *, microbatches):
    """Returns ((loss, accuracy), gradient) of the whole batch, computed one microbatch after another."""
    gradient_of = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        return gradient_of(params, frozen, images, labels, key)

    def split(x):
        # A microbatch is every n-th row of the batch: it has rows on every device, so no row has to move.
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient_of(params, frozen, *microbatch)), None

    slices = (split(images), split(labels), jax.random.split(key, microbatches))
    zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
    total, _ = jax.lax.scan(add, zeros, slices)
    return jax.tree.map(lambda x: x / microbatches, total)
