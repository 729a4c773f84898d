"""Checkpoints of a state with one kernel."""

from pathlib import Path

import jax
import jax.numpy as jnp

from mlpmixer_flax.rundir import write_run
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.step import TrainState

PLACE = sharding.replicated(sharding.make_mesh())


def state(step):
    params = {"kernel": jnp.arange(6.0).reshape(2, 3) + step}
    momentum = {"trace": {"kernel": jnp.ones((2, 3))}}
    return jax.device_put(TrainState(jnp.int32(step), params, momentum, None), PLACE)


def scores(accuracy):
    return {"test/accuracy": accuracy, "test/loss": 1.0}


def save(workdir, accuracies, keep=2):
    """Saves a step for each accuracy, and closes the checkpoints; None = a step that was not evaluated."""
    checkpoints = Checkpoints(workdir, keep=keep)
    for step, accuracy in accuracies.items():
        checkpoints.save(step, state(step), None if accuracy is None else scores(accuracy))
    checkpoints.close()


def kept(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def restore(workdir):
    checkpoints = Checkpoints(workdir, keep=2)
    like = sharding.with_placements(state(0), jax.tree.map(lambda x: x.sharding, state(0)))
    step, restored = checkpoints.restore(like)
    checkpoints.close()
    return step, restored


def files_with_content(folder: Path):
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 0]


def as_run(workdir, ema_decay, **others):
    write_run(
        workdir,
        {"model": {}, "preprocess": {}, "loss": "softmax", "ema_decay": ema_decay, **others},
        class_names=["cat"],
    )
