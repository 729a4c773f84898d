"""Where arrays live: the mesh of devices, the placements on it, and the one door for batches."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, "data"; one CPU is a mesh of one."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The placement of the state and of metrics: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_rows(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: the first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> the global batch, its rows divided over the devices.

    The number of rows, summed over processes, must be divisible by the number of devices.
    """
    placement = split_by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(placement, rows) for name, rows in batch.items()}
