"""Defines the update of a run: the state, how it starts, and the function that changes it."""

from collections.abc import Callable, Mapping
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.data import augment
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.class_weights import unsmoothed
from mlpmixer_flax.training.distillation import divergence
from mlpmixer_flax.training.dropout import dropout_by_image
from mlpmixer_flax.training.gradients import make_gradient
from mlpmixer_flax.training.losses import LOSSES, all_right
from mlpmixer_flax.training.microbatches import microbatches_of
from mlpmixer_flax.training.optimizer import Params, split_frozen
from mlpmixer_flax.training.reproducible import alone, map_chunks
from mlpmixer_flax.training.resolutions import ResizedMixer

DeviceBatch = Mapping[str, jax.Array]  # as of `dataloader`: image, label and mask


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
# The third argument has the parameters of the teacher, () without one.
Update = Callable[[TrainState, DeviceBatch, Params], tuple[TrainState, Metrics]]
# A compiled Update, with its teacher
CompiledUpdate = Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]
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
    model: MlpMixer | ResizedMixer,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    *,
    mesh: jax.sharding.Mesh,
    cropped: bool = False,
    class_weights: np.ndarray | None = None,
    multi_label: bool = False,
    teacher: MlpMixer | None = None,
) -> Update:
    """Returns the update: (state, batch) -> (state, metrics), or with a teacher (state, batch, its parameters).

    Metrics are loss and accuracy before the update (compared with the augmented labels), global norms of the
    gradient and of the updated parameters (only of those that learn), and the learning rate. All randomness
    is a function of the config's seed, the step, and the position of an image in the batch, so nothing random is
    stored. `mesh` has the devices of state and batch. `cropped` is `Examples.cropped`: True if the host has cropped
    the images already. `class_weights` has a weight per class, from `class_weights.weights_of`.
    With `multi_label`, images may have several labels, and the accuracy is the share of images of which all are right.
    With a `teacher`, the loss compares with its predictions for the augmented images, see `distillation`.

    If `optimizer.sam_rho` is above 0, the gradient is computed at parameters that are moved uphill by this
    distance (SAM, arXiv 2010.01412). The direction uphill comes from the whole batch, with the same
    augmentation and dropout.
    """

    def loss_fn(learning, fixed, images, labels, keys):
        frozen, of_teacher = fixed
        params, rngs = {**learning, **frozen}, {"dropout": jax.random.key(0)}
        with dropout_by_image(keys):
            logits = cast(jax.Array, model.apply({"params": params}, images, train=True, rngs=rngs))
        if multi_label:
            correct = all_right(logits, labels > 0.5)
        else:
            correct = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        loss = LOSSES[config.loss]
        if teacher is None:
            losses = loss.per_image(logits, labels)
        else:
            taught = cast(jax.Array, teacher.apply({"params": of_teacher}, images))
            losses = divergence(logits, taught, loss=loss, temperature=config.distill_temperature)
        if image_weights is not None:
            losses *= jnp.sum(labels * image_weights, axis=-1)
        return losses.mean(), correct.mean()

    image_weights = None
    if class_weights is not None:
        image_weights = unsmoothed(class_weights, smoothing=config.augment.label_smoothing)
    augmented = _make_augmented(config, num_classes=model.num_classes, cropped=cropped, mesh=mesh)

    def uphill(learning: Params, grads: Params) -> Params:
        scale = config.optimizer.sam_rho / (optax.tree.norm(grads) + 1e-12)
        return optax.tree.add(learning, optax.tree.scale(scale, grads))

    def apply(state: TrainState, grads: Params) -> tuple[TrainState, Metrics]:
        learning, _ = split_frozen(state.params, config.freeze)
        updates, opt_state = optimizer.update(grads, state.opt_state, learning)
        learning = cast(Params, optax.apply_updates(learning, updates))
        params = {name: learning.get(name, layer) for name, layer in state.params.items()}
        ema = state.ema
        if ema is not None:
            # At first the average is over few updates, so that it forgets the start, like TensorFlow's EMA.
            decay = jnp.minimum(config.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1.0 - decay)
        metrics = {
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(learning),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    if config.reproducible:
        uphill, apply = alone(uphill), alone(apply)

    def train_step(
        state: TrainState, batch: DeviceBatch, of_teacher: Params = ()
    ) -> tuple[TrainState, Metrics]:
        rows = augmented(state.step, batch)
        microbatches = microbatches_of(config, batch_size=len(rows[0]), mesh=mesh)
        gradient_at = make_gradient(
            loss_fn, microbatches=microbatches, reproducible=config.reproducible, mesh=mesh
        )
        learning, frozen = split_frozen(state.params, config.freeze)
        fixed = (frozen, of_teacher)
        (loss, accuracy), grads = gradient_at((learning, fixed), rows)
        if config.optimizer.sam_rho:
            _, grads = gradient_at((uphill(learning, grads), fixed), rows)
        state, metrics = apply(state, grads)
        return state, {"loss": loss, "accuracy": accuracy, **metrics}

    return train_step


def make_preview_step(
    config: ConfigDict, *, num_classes: int, mesh: jax.sharding.Mesh, cropped: bool = False
) -> PreviewStep:
    """Returns a function: first batch -> up to 64 of its images as the first update sees them.

    They are augmented, uint8 (n, size, size, c). `mesh` and `cropped` are those of `make_train_step`.
    """
    augmented = _make_augmented(config, num_classes=num_classes, cropped=cropped, mesh=mesh)

    def preview_step(batch: DeviceBatch) -> jax.Array:
        images, _, _ = augmented(0, batch)
        return augment.denormalize(images[:64], mean=config.preprocess.mean, std=config.preprocess.std)

    return preview_step


def _make_augmented(config, *, num_classes, cropped, mesh):
    """Returns a function (step, batch) -> the rows of the update that follows `step`.

    They are images, label distributions, and keys for dropout.
    """

    def augmented(step, batch, chunk=None):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        if chunk is not None:
            key = jax.random.fold_in(key, chunk)
        augment_key, dropout_key = jax.random.split(key)
        images, labels = augment.augment(
            augment_key,
            batch["image"],
            batch["label"],
            num_classes=num_classes,
            preprocess=config.preprocess.to_dict(),
            cropped=cropped,
            **dict(config.augment),
        )
        return images, labels, jax.random.split(dropout_key, len(images))

    return map_chunks(augmented, chunks=config.reproducible, mesh=mesh) if config.reproducible else augmented
