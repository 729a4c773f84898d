"""Places arrays on devices: the mesh, the placements on it, and the one function that sends batches to it."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlpmixer_flax.faults import start_devices


def make_mesh() -> Mesh:
    """Returns all devices of all processes along one axis, "data"; a single CPU is a mesh of one device.

    Raises:
      UserError: as `start_devices`.
    """
    start_devices()
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement of the state and of metrics: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the placement of a batch: its rows, the first axis, are divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch, divided over the devices by rows, from the rows that each process has.

    The number of rows, summed over all processes, must be divisible by the number of devices.
    """
    placement = split_by_rows(mesh)
    return {name: jax.make_array_from_process_local_data(placement, rows) for name, rows in batch.items()}
