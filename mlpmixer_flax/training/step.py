"""One update: the state, its start, and the function that the loop compiles."""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mlpmixer_flax.data import augment
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import Params, split_frozen

Batch = Mapping[str, jax.Array]  # image: uint8 (n, h, w, c), label: int32 (n,), mask: bool (n,)


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes during a run; the content of a checkpoint."""

    step: jax.Array  # int32 (), completed updates
    params: Params
    opt_state: optax.OptState  # only for parameters that learn
    ema: Params | None  # moving average of the parameters, if config.ema_decay is on

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the EMA if there is one."""
        return self.params if self.ema is None else self.ema


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
    # A copy: the update takes over (donates) the buffers of the whole state, and no buffer may be donated twice.
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
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the update: (state, batch) -> (state, metrics).

    Metrics are float32 scalars of the batch: loss and accuracy before the update (against the augmented
    labels), global norms of the gradient and of the new parameters that learn, learning rate. All randomness
    is a function of the config's seed and the step, so nothing random is stored. `cropped` is that of the
    examples: the host has cropped the images already.

    With `optimizer.sam_rho` the gradient is computed at the parameters moved uphill by rho (SAM, arXiv
    2010.01412). The direction uphill comes from the whole batch, with the same augmentation and dropout.
    """

    def loss_fn(learning, frozen, images, labels, key):
        params = {**learning, **frozen}
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        correct = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        return LOSSES[config.loss].per_image(logits, labels).mean(), correct.mean()

    def train_step(state, batch):
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
        learning = optax.apply_updates(learning, updates)
        params = {name: learning.get(name, layer) for name, layer in state.params.items()}
        ema = state.ema
        if ema is not None:
            # Early, the average is over few updates, so that it forgets the start, as TensorFlow's EMA does.
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


def make_preview_step(
    config: ConfigDict, *, num_classes: int, cropped: bool = False
) -> Callable[[Batch], jax.Array]:
    """Returns a function: first batch -> up to 64 of its images as the first update sees them.

    They are augmented, uint8 (n, size, size, c).
    """

    def preview_step(batch):
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
    """Returns ((loss, accuracy), gradient) of the whole batch, computed one microbatch after the other."""
    gradient_of = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        return gradient_of(params, frozen, images, labels, key)

    def split(x):
        # A microbatch takes every n-th row: it then has rows on every device, and no row has to move.
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient_of(params, frozen, *microbatch)), None

    slices = (split(images), split(labels), jax.random.split(key, microbatches))
    zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
    total, _ = jax.lax.scan(add, zeros, slices)
    return jax.tree.map(lambda x: x / microbatches, total)
