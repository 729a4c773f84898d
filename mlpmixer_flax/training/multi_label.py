"""Evaluates a model on images with several labels each: average precision per class, and its mean.

Average precision ranks all images by their probability of a class, so it needs every probability, not only sums. They
are gathered on the host.
"""

from collections.abc import Iterable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.data import augment
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.evaluation import EvalStep
from mlpmixer_flax.training.losses import LOSSES, all_right
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.training.reproducible import map_chunks
from mlpmixer_flax.training.resolutions import ResizedMixer
from mlpmixer_flax.training.step import DeviceBatch


def make_multi_label_step(
    model: MlpMixer | ResizedMixer, config: ConfigDict, *, mesh: jax.sharding.Mesh, cropped: bool = False
) -> EvalStep:
    """Returns the evaluation of a batch: (params, batch) -> rows of all its images, for `label_scores`.

    The arguments are those of `evaluation.make_eval_step`.
    """
    preprocess = config.preprocess.to_dict()

    def step(params: Params, batch: DeviceBatch, chunk: jax.Array | None = None) -> dict[str, jax.Array]:
        images = augment.prepare(batch["image"], cropped=cropped, **preprocess)
        logits = cast(jax.Array, model.apply({"params": params}, images))
        labels = batch["label"]
        return {
            "loss": LOSSES[config.loss].per_image(logits, labels.astype(jnp.float32)),
            "right": all_right(logits, labels),
            "logit": logits.astype(jnp.float32),
            "label": labels,
            "mask": batch["mask"],
        }

    return map_chunks(step, chunks=config.reproducible, mesh=mesh) if config.reproducible else step


def label_scores(results: Iterable[dict[str, np.ndarray]]) -> tuple[dict[str, float], np.ndarray]:
    """Returns scores over all unmasked images, and the average precision per class, float64 (classes,).

    The scores are `loss`, `accuracy` (the share of images of which exactly the labels have a probability above 0.5) and
    `mean_average_precision` over the classes that have images. The average precision of others is NaN.

    Args:
      results: the rows of each batch.
    """
    parts = []
    for rows in results:
        parts.append({name: values[rows["mask"]] for name, values in rows.items()})
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    precisions = average_precisions(rows["label"], rows["logit"])
    scores = {
        "loss": float(rows["loss"].mean(dtype=np.float64)),
        "accuracy": float(rows["right"].mean()),
        "mean_average_precision": float(np.nanmean(precisions)) if rows["label"].any() else 0.0,
    }
    return scores, precisions


def average_precisions(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, float64 (classes,); NaN for a class without images.

    It is the mean, over the images of the class, of the precision if this image and all with at least its score are
    predicted as the class; as scikit-learn's average_precision_score.

    Args:
      labels: (n, classes), 1 for the labels of an image, 0 for others.
      scores: (n, classes); the greater, the more probable; NaN counts as the least.
    """
    found = np.full(labels.shape[1], np.nan)
    for number, (label, score) in enumerate(zip(labels.T > 0, scores.T, strict=True)):
        if label.any():
            hits, said, _ = thresholds_of(label, score)
            found[number] = np.sum(np.diff(hits, prepend=0) * hits / said) / hits[-1]
    return found


def thresholds_of(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each different score as the threshold, the highest first: hits, images said, and the threshold.

    `hits` are images of the class whose score is at least the threshold, and `said` are all images with such a score.

    Args:
      label: bool (n,), whether an image is of the class.
      score: float (n,).
    """
    score = np.nan_to_num(score, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=np.nan) != 0)  # the last image of each score
    return np.cumsum(label[order])[ends], ends + 1, score[order][ends]
