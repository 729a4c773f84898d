"""Evaluates a model on a split: sums per batch on the devices, means over the split on the host."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.data import augment
from mlpmixer_flax.dataloader import Batch
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.training.reproducible import sum_over_chunks
from mlpmixer_flax.training.resolutions import ResizedMixer
from mlpmixer_flax.training.step import DeviceBatch

EvalStep = Callable[[Params, DeviceBatch], dict[str, jax.Array]]  # (params, batch) -> arrays by name
Results = TypeVar("Results")


def make_eval_step(
    model: MlpMixer | ResizedMixer, config: ConfigDict, *, mesh: jax.sharding.Mesh, cropped: bool = False
) -> EvalStep:
    """Returns the evaluation of a batch: (params, batch) -> sums over its unmasked images.

    `loss`, `accuracy` and `accuracy_top5` are sums and `count` is the number of images, so that one division
    at the end gives the means. `class_accuracy` and `class_count` are vectors with the same sums per class.
    `mesh` has the devices of parameters and batch. `cropped` is `Examples.cropped`: True if the host has cropped the
    images already.
    """
    preprocess = config.preprocess.to_dict()

    def eval_step(params: Params, batch: DeviceBatch) -> dict[str, jax.Array]:
        images = augment.prepare(batch["image"], cropped=cropped, **preprocess)
        logits = cast(jax.Array, model.apply({"params": params}, images))
        one_hot = jax.nn.one_hot(batch["label"], model.num_classes)
        correct = jax.lax.top_k(logits, min(5, model.num_classes))[1] == batch["label"][:, None]
        rows = {
            "loss": LOSSES[config.loss].per_image(logits, one_hot),
            "accuracy": correct[:, 0],
            "accuracy_top5": correct.any(axis=-1),
            "count": jnp.ones_like(batch["mask"]),
            "class_accuracy": one_hot * correct[:, :1],
            "class_count": one_hot,
        }
        # Transposed, so that the mask also broadcasts over vectors.
        return {
            name: jnp.sum(jnp.where(batch["mask"], row.T, 0), axis=-1, dtype=jnp.float32)
            for name, row in rows.items()
        }

    if config.reproducible:
        return sum_over_chunks(eval_step, chunks=config.reproducible, mesh=mesh)
    everywhere = sharding.replicated(mesh)
    return lambda params, batch: eval_step(jax.lax.with_sharding_constraint(params, everywhere), batch)


def evaluate(
    eval_step: EvalStep, params: Params, batches: Iterable[Batch], *, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Returns means over all unmasked images: `loss`, and `accuracy` and `accuracy_top5` in [0, 1].

    `balanced_accuracy` is the mean of the accuracies of all classes that have images.

    `eval_step` is a jitted `make_eval_step`. Sums and counts are added over all batches and divided once, so
    every image has the same weight, also in a partly filled last batch.
    """
    return class_scores(one_batch_late(eval_step, params, batches, mesh=mesh))[0]


def class_scores(results: Iterable[dict[str, np.ndarray]]) -> tuple[dict[str, float], np.ndarray]:
    """Returns the scores of `evaluate`, and the accuracy per class, float64 (classes,), from the sums of each batch.

    The accuracy of a class without images is NaN; `balanced_accuracy` is the mean over the other classes.
    """
    totals: dict[str, np.ndarray] = {}
    for sums in results:
        for name, value in sums.items():
            totals[name] = totals.get(name, np.zeros(value.shape)) + value  # in float64
    count, class_count = totals.pop("count"), totals.pop("class_count")
    with np.errstate(invalid="ignore"):
        class_accuracy = totals.pop("class_accuracy") / class_count
    scores = {name: float(total / count) for name, total in totals.items()}
    scores["balanced_accuracy"] = float(np.nanmean(class_accuracy))
    return scores, class_accuracy


def evaluate_sizes(
    eval_steps: Mapping[int, EvalStep],
    summarize: Callable[[Iterable[dict[str, np.ndarray]]], Results],
    params: Params,
    batches: Iterable[Batch],
    *,
    mesh: jax.sharding.Mesh,
) -> dict[int, Results]:
    """Returns the scores of each size, from one pass over the data.

    Args:
      eval_steps: the compiled evaluation of a batch, by size.
      summarize: from the results of all batches to scores: `class_scores` or `multi_label.label_scores`.
    """

    def at_every_size(params, batch):
        return {size_px: eval_step(params, batch) for size_px, eval_step in eval_steps.items()}

    results = list(one_batch_late(at_every_size, params, batches, mesh=mesh))
    return {size_px: summarize(each[size_px] for each in results) for size_px in eval_steps}


def one_batch_late(
    step: Callable[[Params, DeviceBatch], Any],
    params: Params,
    batches: Iterable[Batch],
    *,
    mesh: jax.sharding.Mesh,
) -> Iterator[Any]:
    """Yields the results of a jitted step for each batch, fetched while the device works on the next one."""
    waiting = None
    for batch in batches:
        result = step(params, sharding.put_batch(batch, mesh))
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = result
    if waiting is not None:
        yield jax.device_get(waiting)
