"""Places arrays on devices: the mesh, the placements on it, and the functions that send and gather arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlpmixer_flax.faults import start_devices

AXES = ("data", "fsdp")  # the axes of the mesh; the rows of a batch are divided over both
COPIED, BY_ROWS = PartitionSpec(), PartitionSpec(AXES)


def make_mesh(*, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns devices as a mesh with the axes "data" and "fsdp", those of a process beside each other.

    Each `fsdp` devices in a row hold one copy of the state, of which every device has a part; with 1, every device has
    a copy of its own. A single CPU is a mesh of one device.

    Args:
      devices: of JAX; None = all devices of all processes.

    Raises:
      UserError: as `start_devices`.
    """
    if devices is None:
        start_devices()
        devices = jax.devices()
    # Not jax.make_mesh: it may choose another order, and then a process would not have rows that follow each other.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement of arrays of which every device has a whole copy."""
    return NamedSharding(mesh, COPIED)


def split_by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the placement of a batch: its rows, the first axis, are divided over the devices."""
    return NamedSharding(mesh, BY_ROWS)


def state_specs(tree: Any, mesh: Mesh) -> Any:
    """Returns how the arrays of a state are divided: a tree of PartitionSpec.

    A kernel, and what the optimizer and the EMA keep of it, is divided along the first axis that can be divided by the
    mesh's "fsdp". Vectors and scalars are copied: they are a small part of the state, and many small messages are slow.
    """
    parts = mesh.shape["fsdp"]

    def spec(array: Any) -> PartitionSpec:
        divisible = [axis for axis, length in enumerate(array.shape) if length % parts == 0]
        if parts == 1 or len(array.shape) < 2 or not divisible:
            return COPIED
        return PartitionSpec(*[None] * divisible[0], "fsdp")

    return jax.tree.map(spec, tree)


def state_placements(tree: Any, mesh: Mesh) -> Any:
    """Returns the placements of the arrays of a state: a tree of NamedSharding, see `state_specs`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tree, mesh))


def with_placements(shapes: Any, placements: Any) -> Any:
    """Returns shapes and dtypes with placements, two trees of the same structure, as one tree of ShapeDtypeStruct."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, placements
    )


def gather(shards: Any, specs: Any) -> Any:
    """Returns whole arrays from the parts that this device has; for use inside `jax.shard_map`."""

    def whole(shard: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.all_gather(shard, "fsdp", axis=len(spec) - 1, tiled=True) if spec else shard

    return jax.tree.map(whole, shards, specs)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch, divided over the devices by rows, from the rows that each process has.

    The number of rows, summed over all processes, must be divisible by the number of devices.
    """
    placement = split_by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(placement, rows) for name, rows in batch.items()}


def put_parts(tree: Any, placements: Any) -> Any:
    """Returns numpy arrays on the devices, each of which receives only its own part.

    Every process must have the same whole arrays.
    """
    return jax.tree.map(
        lambda array, placement: jax.make_array_from_callback(array.shape, placement, array.__getitem__),
        tree,
        placements,
    )
