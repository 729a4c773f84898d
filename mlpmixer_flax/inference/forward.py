"""Runs a function on all devices over batches from the host, and returns one row of results per image."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.dataloader import Batch
from mlpmixer_flax.faults import is_memory
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.evaluation import one_batch_late
from mlpmixer_flax.training.optimizer import Params

Rows = dict[str, np.ndarray]  # name -> array with one row per image
RowFunction = Callable[[Params, Mapping[str, jax.Array]], dict[str, jax.Array]]  # (params, batch) -> rows


def on_all_devices(function: RowFunction) -> RowFunction:
    """Returns the function, compiled for `forward`: the rows of a batch are divided over all devices."""

    def with_mask(params, batch):
        return {**function(params, batch), "mask": batch["mask"]}

    return jax.jit(with_mask, out_shardings=sharding.replicated(sharding.make_mesh()))


def forward(function: RowFunction, params: Params, batches: Iterable[Batch]) -> Iterator[Rows]:
    """Yields the results of each batch, without rows of padding, while the devices work on the next batch.

    `function` comes from `on_all_devices`, and the number of rows of all batches from `rows_per_batch`.

    Raises:
      UserError: as `check_finite`.
    """
    mesh = sharding.make_mesh()
    params = jax.device_put(params, sharding.replicated(mesh))
    results = one_batch_late(function, params, batches, mesh=mesh)
    while (rows := _next(results)) is not None:
        mask = rows.pop("mask")
        rows = {name: values[mask] for name, values in rows.items()}
        check_finite(rows)
        yield rows


def check_finite(rows: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Raises UserError if a result is NaN or infinite, as those of a model whose weights are finite, but too large."""
    for name, values in rows.items():
        bad = np.asarray(values)[~np.isfinite(values)]
        if bad.size:
            raise UserError(
                f"the model computes values that are not finite ({name}: {bad[0]}), because its weights are too large: "
                "choose an earlier step, or other weights"
            )


def _next(results: Iterator[Rows]) -> Rows | None:
    try:
        return next(results, None)
    except Exception as error:
        if is_memory(error):
            error.add_note("a smaller batch_size needs less")
        raise


def rows_per_batch(batch_size: int) -> int:
    """Returns the batch size, rounded up to a multiple of the number of devices."""
    return -(-batch_size // jax.device_count()) * jax.device_count()


def concatenate(parts: Iterable[Rows]) -> Rows:
    """Returns the rows of all batches in one dict; there must be at least one batch."""
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
