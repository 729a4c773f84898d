"""Computes the mean gradient of a batch: over microbatches, devices, or fixed chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.training.reproducible import sum_over_chunks
from mlpmixer_flax.training.sharding import AXES, BY_ROWS, COPIED, gather, state_specs

Rows = tuple[jax.Array, ...]  # arrays with one row per image
Means = tuple[Any, Params]  # (the means of what the loss function returns, the gradient of the mean loss)
# ((parameters that learn, others), rows) -> means; the others are those of frozen layers and of a teacher
Gradient = Callable[[tuple[Params, Params], Rows], Means]


def make_gradient(
    loss_fn: Callable[..., tuple[jax.Array, Any]], *, microbatches: int, reproducible: int, mesh: Mesh
) -> Gradient:
    """Returns the gradient of a mean loss, and the means of what the loss function returns.

    Args:
      loss_fn: (parameters that learn, others, *rows) -> (mean loss, another mean).
      microbatches: how many parts of its rows a device computes one after another.
      reproducible: `config.reproducible`.
      mesh: the devices of parameters and batch.
    """

    def of_part(params: tuple[Params, Params], rows: Rows) -> Means:
        return _mean_over_microbatches(loss_fn, params, rows, microbatches=microbatches)

    if not reproducible:
        return _mean_over_devices(of_part, mesh)
    total = sum_over_chunks(of_part, chunks=reproducible, mesh=mesh)
    return lambda params, rows: jax.tree.map(lambda x: x / reproducible, total(params, rows))


def _mean_over_microbatches(loss_fn, params, rows, *, microbatches):
    gradient_of = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        return gradient_of(*params, *rows)

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, gradient_of(*params, *microbatch)), None

    slices = [x.reshape(microbatches, -1, *x.shape[1:]) for x in rows]
    zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params[0]))
    total, _ = lax.scan(add, zeros, slices)
    return jax.tree.map(lambda x: x / microbatches, total)


def _mean_over_devices(function: Gradient, mesh: Mesh) -> Gradient:
    """Returns the gradient over all devices: each computes that of its own rows, with all parameters.

    Parameters that are divided over devices are gathered before their use, and their gradients end divided in the same
    way. The sums over devices are in float32, also if the model computes in bfloat16.
    """

    def mean(x: jax.Array, spec) -> jax.Array:
        if spec:
            x = lax.psum_scatter(x, "fsdp", scatter_dimension=len(spec) - 1, tiled=True)
        return lax.psum(x, "data" if spec else AXES) / mesh.size

    def call(params: tuple[Params, Params], rows: Rows) -> Means:
        specs = state_specs(params, mesh)

        def on_device(shards, rows):
            means, gradient = function(gather(shards, specs), rows)
            return jax.tree.map(lambda x: mean(x, COPIED), means), jax.tree.map(mean, gradient, specs[0])

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(specs, BY_ROWS),
            out_specs=(COPIED, specs[0]),
            check_vma=False,
        )(params, rows)

    return call
