"""Scores of a model over a whole split."""

import collections
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from mlpmixer_flax import sharding


def evaluate(
    eval_step: Callable,
    params,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Means over all unmasked images: `loss`, `accuracy` and `accuracy_top5` in [0, 1].

    `eval_step` is a jitted `step.make_eval_step`; sums and counts are added up and divided once, so a
    partly filled last batch weighs what it holds.
    """
    totals = collections.Counter()
    waiting = None  # the device works on one batch while the sums of the one before are fetched
    for batch in batches:
        sums = eval_step(params, sharding.put_batch(batch, mesh))
        totals.update(jax.device_get(waiting or {}))
        waiting = sums
    totals.update(jax.device_get(waiting or {}))
    count = totals.pop("count")
    return {name: float(total / count) for name, total in totals.items()}
