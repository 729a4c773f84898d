"""Computes a batch in fixed chunks, so that all bits of the result are the same on any number of devices.

Three things would make them differ, and each has its place here:
- Floating-point sums depend on their order. `sum_over_chunks` adds the results of the chunks in one fixed binary tree.
- A compiler may round differently if it merges operations. `alone` compiles a part of the update apart from the rest.
- The CPU's matrix products depend on the number of threads. `check_threads` refuses if it may change.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from mlpmixer_flax import UserError
from mlpmixer_flax.training.sharding import AXES, BY_ROWS, COPIED

ChunkFunction = Callable[..., Any]  # (shared, rows of a chunk) -> a tree of arrays


def check_threads(chunks: int) -> None:
    """Checks that the CPU's matrix products use as many threads as there are chunks, whatever the number of devices.

    Raises:
      UserError: they may use another number.
    """
    # JAX makes a pool of max(NPROC or the number of cores, the number of devices) threads when it starts the devices,
    # and how a product is divided into blocks depends on it. Programs start the devices before they know the config.
    if jax.default_backend() == "cpu" and os.environ.get("NPROC") != str(chunks):
        raise UserError(
            f"reproducible={chunks} on CPUs needs {chunks} threads, and JAX uses as many as there are cores: start the "
            f"program with NPROC={chunks} in the environment"
        )


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function, compiled apart from everything around its calls.

    The first array among the arguments must be known only at run time. If its first number is infinite, all results
    are NaN, so that a run which has diverged does not go on.
    """

    # XLA's compiler for CPUs ignores optimization barriers when it merges operations, and it removes loops of one
    # iteration. It keeps branches, if it cannot know which of them is taken. This is a precaution: with jax 0.10 on a
    # CPU, six configs had the same bits on 1 to 8 devices without it too.
    def call(*args: Any) -> Any:
        def nothing(*args: Any) -> Any:
            return jax.tree.map(_not_a_number, jax.eval_shape(function, *args))

        first = jax.tree.leaves(args)[0].ravel()[0]
        largest = jnp.inf if jnp.issubdtype(first.dtype, jnp.floating) else jnp.iinfo(first.dtype).max
        return lax.cond(first == largest, nothing, function, *args)

    return call


def _not_a_number(like: jax.ShapeDtypeStruct) -> jax.Array:
    floating = jnp.issubdtype(like.dtype, jnp.floating)
    return jnp.full(like.shape, jnp.nan, like.dtype) if floating else jnp.zeros(like.shape, like.dtype)


def map_chunks(function: ChunkFunction, *, chunks: int, mesh: Mesh) -> ChunkFunction:
    """Returns a function (shared, rows) -> the rows that `function` (shared, rows, number of the chunk) returns.

    `shared` and the rows are trees. Every device computes its chunks one after another.
    """

    def on_device(shared: Any, rows: Any) -> Any:
        numbers = lax.axis_index(AXES) * (chunks // mesh.size) + jnp.arange(chunks // mesh.size)
        results = lax.map(lambda of: alone(function)(shared, *of), (_by_chunk(rows, len(numbers)), numbers))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(COPIED, BY_ROWS), out_specs=BY_ROWS, check_vma=False)


def sum_over_chunks(function: ChunkFunction, *, chunks: int, mesh: Mesh) -> ChunkFunction:
    """Returns a function (shared, rows) -> the sum over all chunks of the float32 arrays that `function` returns.

    Every device computes its chunks one after another, and holds their results at the same time.
    """

    def on_device(shared: Any, rows: Any) -> Any:
        parts = lax.map(lambda rows: alone(function)(shared, rows), _by_chunk(rows, chunks // mesh.size))
        flat = jax.vmap(lambda part: ravel_pytree(part)[0])(parts)
        unravel = ravel_pytree(jax.tree.map(lambda x: x[0], parts))[1]
        while len(flat) > 1:
            flat = flat[0::2] + flat[1::2]
        return unravel(_sum_over_devices(flat[0], mesh.size))

    return jax.shard_map(on_device, mesh=mesh, in_specs=(COPIED, BY_ROWS), out_specs=COPIED, check_vma=False)


def _by_chunk(rows: Any, chunks: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), rows)


def _sum_over_devices(x: jax.Array, count: int) -> jax.Array:
    """Returns the sum of a vector over `count` devices, a power of two, added in the binary tree of neighbors.

    Recursive halving: at each level of the tree a device exchanges half of its sums with its partner. At the end each
    has one part of the sum, and all parts are gathered. It sends about as much as the usual ring. Addition commutes in
    IEEE arithmetic, so it does not matter which partner adds.
    """
    size, levels = len(x), count.bit_length() - 1
    x = jnp.pad(x, (0, -size % count))
    device = lax.axis_index(AXES)
    for level in range(levels):
        halves, kept = x.reshape(2, -1), (device >> level) & 1
        pairs = [(one, one ^ (1 << level)) for one in range(count)]
        x = halves[kept] + lax.ppermute(halves[1 - kept], AXES, pairs)
    # The lowest bit of a device's number tells in which half of all its part is, the next one in which quarter, ...
    parts = lax.all_gather(x, AXES).reshape(*(2,) * levels, -1)
    return parts.transpose(*reversed(range(levels)), levels).ravel()[:size]
