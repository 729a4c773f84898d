"""Builds the optimizer of a run: learning rate schedule, update rule, weight decay and frozen layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict

Params = Any  # a tree of arrays, as flax.linen's init returns it under "params"


def _scale_by_adam(o: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(o.b1, o.b2, mu_dtype=o.accumulator_dtype)


# Root mean square of an update of Muon: the usual one of Adam, so that one learning rate suits both
_MUON_SIZE = 0.2


def _scale_by_muon(o: ConfigDict) -> optax.GradientTransformation:
    """Returns Muon (arXiv 2502.16982) for the matrices of the Mixer blocks, and Adam for everything else."""

    def are_hidden(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, p: path[0].key.startswith("MixerBlock_") and p.ndim > 1, params
        )

    def as_matrices(params: Params) -> Params:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)

    def resize(updates: Params, params: Params | None = None) -> Params:
        return jax.tree.map(lambda x: x * _MUON_SIZE / (jnp.sqrt(jnp.mean(x**2)) + 1e-8), updates)

    muon = optax.contrib.scale_by_muon(
        beta=o.momentum, mu_dtype=o.accumulator_dtype, weight_dimension_numbers=as_matrices
    )
    return optax.partition(
        {True: optax.chain(muon, optax.stateless(resize)), False: _scale_by_adam(o)}, are_hidden
    )


# config.optimizer.name -> function that takes config.optimizer and returns how a gradient becomes a direction
DIRECTIONS = {
    "adam": _scale_by_adam,
    "adamw": _scale_by_adam,
    "muon": _scale_by_muon,
    "sgd": lambda o: optax.trace(o.momentum, accumulator_dtype=o.accumulator_dtype),
}

# config.schedule.name -> function that returns the schedule after warmup, from the highest learning rate, the
# fraction of it at the end, the number of steps after warmup and the number of warmup steps
SCHEDULES = {
    "cosine": lambda peak, final, steps, warmup: optax.cosine_decay_schedule(peak, steps, alpha=final),
    "linear": lambda peak, final, steps, warmup: optax.linear_schedule(peak, peak * final, steps),
    "constant": lambda peak, final, steps, warmup: optax.constant_schedule(peak),
    "rsqrt": lambda peak, final, steps, warmup: lambda step: peak * jnp.sqrt(warmup / (warmup + step)),
}


def make_schedule(config: ConfigDict, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warmup from 0, then config.schedule."""
    peak = config.optimizer.learning_rate
    steps = max(total_steps - warmup_steps, 1)
    after_warmup = SCHEDULES[config.schedule.name](peak, config.schedule.final_fraction, steps, warmup_steps)
    if not warmup_steps:
        return after_warmup
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after_warmup], [warmup_steps]
    )


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of config.optimizer.

    It is a chain: clip the gradient by its global norm, turn it into a direction, add the decoupled weight
    decay, and multiply by the learning rate.
    """
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        DIRECTIONS[o.name](o),
        optax.add_decayed_weights(o.weight_decay, mask=kernels_only) if o.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def kernels_only(params: Params) -> Params:
    """Returns a tree of booleans: True for kernels, False for biases and the scales of LayerNorm."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def split_frozen(params: Params, freeze: str) -> tuple[Params, Params]:
    """Splits parameters by layer into (layers that learn, frozen layers); `freeze` is config.freeze.

    Raises:
      UserError: `freeze` names a layer that does not exist, or all layers.
    """
    frozen = params.keys() - {"head"} if freeze == "all_but_head" else _named(freeze)
    if frozen - params.keys() or frozen == params.keys():
        raise UserError(
            f"freeze={freeze!r} must be 'all_but_head' or some, but not all, of the layers "
            f"{', '.join(params)}, separated by commas"
        )
    return (
        {name: layer for name, layer in params.items() if name not in frozen},
        {name: layer for name, layer in params.items() if name in frozen},
    )


def check_frozen_head(freeze: str, kernel: Any) -> None:
    """Checks that config.freeze does not freeze a new head: all its logits are equal, and no layer would learn.

    `kernel` is the head's kernel at the start of the run.

    Raises:
      UserError: it does.
    """
    if "head" in _named(freeze) and not np.any(kernel):
        raise UserError(
            f"freeze={freeze!r} freezes a new head, whose weights are all 0, so no layer can learn: leave 'head' out "
            "of --config.freeze, or give weights with a head for the same classes as --config.init_from"
        )


def _named(freeze: str) -> set[str]:
    return set(filter(None, (name.strip() for name in freeze.split(","))))
