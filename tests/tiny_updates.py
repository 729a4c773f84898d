"""Updates of a tiny Mixer that tests share, and the losses in NumPy."""

from functools import cache

import jax
import numpy as np

from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import TrainState, init_state, make_train_step

CLASSES = 3
MESH = sharding.make_mesh()
# Compiling takes most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0}
TINY = {
    "model.patches.size": (4, 4),
    "model.hidden_dim": 8,
    "model.num_blocks": 1,
    "model.tokens_mlp_dim": 6,
    "model.channels_mlp_dim": 10,
}
# Plain gradient descent: an error in a gradient changes the parameters in proportion.
DESCENT = {
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.learning_rate": 0.1,
    "schedule.name": "constant",
}
SHIFTED = {"augment.crop_padding_px": 1, "augment.flip": True}
MIXED = {"augment.mixup_alpha": 0.5, "augment.cutmix_alpha": 1.0, "augment.label_smoothing": 0.1}


def config_with(**values):
    config = get_config()
    config.update_from_flattened_dict({**TINY, **values})
    return resolve(config, {})


def tiny_model(config):
    return MlpMixer(num_classes=CLASSES, **config.model.to_dict())


def tiny_batch(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, n, dtype=np.int32),
        "mask": np.ones(n, bool),
    }


def make_run(**values):
    """Returns a jitted update, and a state in which no parameters are zero, not even head and biases."""
    return _make_run(tuple(sorted(values.items())))


@cache  # tests share compiled updates
def _make_run(values):
    values = dict(values)
    warmup_steps = values.get("schedule.warmup_steps", 0)
    config = config_with(**values)
    model = tiny_model(config)
    schedule = make_schedule(config, total_steps=10, warmup_steps=warmup_steps)
    optimizer = make_optimizer(config, schedule)
    state = jax.eval_shape(lambda: start(model, optimizer, config))
    update = make_train_step(model, optimizer, schedule, config, mesh=MESH)
    return jax.jit(update, compiler_options=QUICK), fill(state)


def start(model, optimizer, config):
    return init_state(None, model=model, optimizer=optimizer, config=config, image_shape=(8, 8, 1))


def fill(state):
    """Fills the shapes of a state: random parameters, an EMA equal to them, an optimizer state of zeros."""
    rng = np.random.default_rng(7)

    def zeros(tree):
        return jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), tree)

    params = jax.tree.map(
        lambda p: rng.normal(0, 0.3, p.shape).astype(p.dtype) + np.float32(p.ndim == 1), state.params
    )
    ema = None if state.ema is None else params
    return TrainState(zeros(state.step), params, zeros(state.opt_state), ema)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def loss_by_hand(name, logits, labels):
    if name == "softmax":
        return -(labels * log_softmax(logits)).sum(-1)
    p = 1 / (1 + np.exp(-logits))
    return -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(-1)
