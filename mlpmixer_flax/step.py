"""One update and one evaluation of a batch: state, optimizer, loss, and the functions that `train` jits."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mlpmixer_flax import UserError, augment

Params = Any  # a tree of arrays
Batch = Mapping[str, jax.Array]  # image: uint8 (n, h, w, c), label: int32 (n,), mask: bool (n,)


class TrainState(flax.struct.PyTreeNode):
    """All that changes in a run; what a checkpoint holds."""

    step: jax.Array  # int32 (), completed updates
    params: Params
    opt_state: optax.OptState  # of the parameters that learn
    ema: Params | None  # moving average of the parameters, where config.ema_decay is on

    @property
    def eval_params(self) -> Params:
        """The parameters to evaluate: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def _softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits, labels)


def _sigmoid_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)


# (n, classes) logits and label distributions -> (n,)
LOSSES = {"softmax": _softmax_loss, "sigmoid": _sigmoid_loss}


def make_schedule(config: ConfigDict, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate by completed updates: linear from 0 over the warmup, then config.schedule.name."""
    peak = config.optimizer.learning_rate
    final = config.schedule.final_fraction
    rest = max(total_steps - warmup_steps, 1)
    after_warmup = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, peak * final, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "rsqrt": lambda: lambda step: peak * jnp.sqrt(warmup_steps / (warmup_steps + step)),
    }[config.schedule.name]()
    if not warmup_steps:
        return after_warmup
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after_warmup], [warmup_steps]
    )


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clip by global norm, then the optimizer's direction, then decoupled weight decay (kernels only)."""
    o = config.optimizer
    direction = {
        "adam": lambda: optax.scale_by_adam(o.b1, o.b2, mu_dtype=o.accumulator_dtype),
        "adamw": lambda: optax.scale_by_adam(o.b1, o.b2, mu_dtype=o.accumulator_dtype),
        "sgd": lambda: optax.trace(o.momentum, accumulator_dtype=o.accumulator_dtype),
    }[o.name]()
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        direction,
        optax.add_decayed_weights(o.weight_decay, mask=kernels_only) if o.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def kernels_only(params: Params) -> Params:
    """A tree of booleans: True for kernels, False for biases and the scales of LayerNorm."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def split_frozen(params: Params, freeze: str) -> tuple[Params, Params]:
    """Parameters as (those that learn, those that don't), by layer; `freeze` is config.freeze."""
    frozen = set(filter(None, (name.strip() for name in freeze.split(","))))
    if freeze == "all_but_head":
        frozen = params.keys() - {"head"}
    if frozen - params.keys() or frozen == params.keys():
        raise UserError(
            f"freeze={freeze!r} must be 'all_but_head' or some, not all, of {', '.join(params)}, joined by commas"
        )
    return (
        {name: layer for name, layer in params.items() if name not in frozen},
        {name: layer for name, layer in params.items() if name in frozen},
    )


def init_state(
    params: Params | None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """The state before the first update, with random parameters where none are given.

    `image_shape` is (height, width, channels) of the model's input.
    """
    if params is None:
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, *image_shape)))["params"]
    # A copy: the update is donated its whole state, and no buffer may be donated twice.
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    learning, _ = split_frozen(params, config.freeze)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(learning), ema)


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, schedule: optax.Schedule, config: ConfigDict
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The update: (state, batch) -> (state, metrics).

    Metrics are float32 scalars of the batch: loss and accuracy before the update (against the augmented
    labels), global norms of the gradient and of the new parameters that learn, learning rate. All randomness
    derives from the config's seed and the step, so nothing random is stored.

    With `optimizer.sam_rho` the gradient is that at the parameters moved rho uphill (SAM, arXiv 2010.01412),
    found from the whole batch, with the same augmentation and dropout.
    """

    def loss_fn(learning, frozen, images, labels, key):
        params = {**learning, **frozen}
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
        correct = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        return LOSSES[config.loss](logits, labels).mean(), correct.mean()

    def train_step(state, batch):
        images, labels, dropout_key = _augmented(
            state.step, batch, config=config, num_classes=model.num_classes
        )
        learning, frozen = split_frozen(state.params, config.freeze)

        def gradient_at(learning):
            return _mean_gradient(
                loss_fn, learning, frozen, images, labels, dropout_key, passes=config.accumulation_steps
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
            # Early on the average is over few updates: the start is forgotten, as tf.train's average does.
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


def make_look_step(config: ConfigDict, *, num_classes: int) -> Callable[[Batch], jax.Array]:
    """What the first update sees: batch -> up to 64 of its images, augmented, uint8 (n, size, size, c)."""

    def look_step(batch):
        images, _, _ = _augmented(0, batch, config=config, num_classes=num_classes)
        return augment.denormalize(images[:64], mean=config.preprocess.mean, std=config.preprocess.std)

    return look_step


def _augmented(step, batch, *, config, num_classes):
    """(images, label distributions, key for dropout) of the update after `step`."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    images, labels = augment.augment(
        augment_key,
        batch["image"],
        batch["label"],
        num_classes=num_classes,
        preprocess=config.preprocess.to_dict(),
        **dict(config.augment),
    )
    return images, labels, dropout_key


def _mean_gradient(loss_fn, params, frozen, images, labels, key, *, passes):
    """((loss, accuracy), gradient) of the whole batch, taken in `passes` equal parts one after the other."""
    gradient_of = jax.value_and_grad(loss_fn, has_aux=True)
    if passes == 1:
        return gradient_of(params, frozen, images, labels, key)

    def parts(x):
        # Every `passes`-th row: each part then holds rows of every device, and none has to move.
        return x.reshape(-1, passes, *x.shape[1:]).swapaxes(0, 1)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, gradient_of(params, frozen, *part)), None

    slices = (parts(images), parts(labels), jax.random.split(key, passes))
    zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
    total, _ = jax.lax.scan(add_part, zeros, slices)
    return jax.tree.map(lambda x: x / passes, total)


def make_eval_step(model: nn.Module, config: ConfigDict) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """The evaluation of a batch: (params, batch) -> sums over its unmasked images.

    `loss`, `accuracy` and `accuracy_top5` are sums, `count` the number of images: divide once, at the end.
    `class_accuracy` and `class_count` are vectors of the same for each class.
    """
    preprocess = config.preprocess.to_dict()

    def eval_step(params, batch):
        logits = model.apply({"params": params}, augment.prepare(batch["image"], **preprocess))
        one_hot = jax.nn.one_hot(batch["label"], model.num_classes)
        best = jax.lax.top_k(logits, min(5, model.num_classes))[1] == batch["label"][:, None]
        rows = {
            "loss": LOSSES[config.loss](logits, one_hot),
            "accuracy": best[:, 0],
            "accuracy_top5": best.any(axis=-1),
            "count": jnp.ones_like(batch["mask"]),
            "class_accuracy": one_hot * best[:, :1],
            "class_count": one_hot,
        }
        # Transposed, so that the mask fits vectors too.
        return {
            name: jnp.sum(jnp.where(batch["mask"], row.T, 0), axis=-1, dtype=jnp.float32)
            for name, row in rows.items()
        }

    return eval_step
