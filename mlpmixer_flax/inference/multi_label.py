"""Scores a split whose images have several labels each, and finds the threshold of each class.

`rows` is a dict of arrays with one row per image: `label` uint8 (n, classes), 1 for each label; `probability` float32
(n, classes); and `loss` float (n,).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.dataloader import Examples
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.inference.forward import Rows
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.scores import rows_of_split, table_of_classes
from mlpmixer_flax.limits import show
from mlpmixer_flax.reading import read_json
from mlpmixer_flax.text import pad
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.multi_label import average_precisions, thresholds_of

USUAL_THRESHOLD = 0.5


def score_multi_label(model: Model, examples: Examples, *, classes: np.ndarray, batch_size: int = 64) -> Rows:
    """Returns the `rows` of a split, in its order; columns are the model's classes.

    The arguments are those of `scores.score_images`.

    Raises:
      UserError: the model was trained with the softmax loss.
    """
    if model.loss != "sigmoid":
        raise UserError(
            f"{model.name} was trained with loss={model.loss}, for one label per image, but images of {examples.name} may "
            "have several: choose a model that was trained with the sigmoid loss"
        )
    loss, num_classes = LOSSES[model.loss], len(model.class_names)

    def score(params, batch):
        logits = model.logits(params, batch["image"], cropped=examples.cropped)
        label = batch["label"].astype(jnp.float32)
        return {
            "label": batch["label"],
            "probability": loss.probabilities(logits),
            "loss": loss.per_image(logits, label),
        }

    def relabel(labels: np.ndarray) -> np.ndarray:
        relabelled = np.zeros((len(labels), num_classes), np.uint8)
        relabelled[:, classes] = labels
        return relabelled

    return rows_of_split(score, model, examples, relabel=relabel, batch_size=batch_size)


def measure_multi_label(rows: Rows) -> dict[str, float]:
    """Returns `mean_average_precision`, `accuracy` and `loss`, as `training.multi_label.label_scores`."""
    precisions = average_precisions(rows["label"], rows["probability"])
    right = (rows["probability"] > USUAL_THRESHOLD) == (rows["label"] > 0)
    return {
        "mean_average_precision": float(np.nanmean(precisions)) if rows["label"].any() else 0.0,
        "accuracy": float(right.all(axis=1).mean()),
        "loss": float(rows["loss"].mean(dtype=np.float64)),
    }


def per_class(rows: Rows, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, per class, its number, name and images, average precision, best threshold, and the scores with it.

    `threshold` is the probability from which an image is said to be of the class that gives the highest F1 on these
    images; it lies halfway between the probabilities of two images. A class without images has only None.
    """
    precisions = average_precisions(rows["label"], rows["probability"])
    found = []
    for number, name in enumerate(class_names):
        label = rows["label"][:, number] > 0
        row = {"class": number, "name": name, "images": int(label.sum())}
        row |= dict.fromkeys(("average_precision", "threshold", "precision", "recall", "f1"))
        if label.any():
            hits, said, scores = thresholds_of(label, rows["probability"][:, number])
            f1 = 2 * hits / (said + hits[-1])
            best = int(f1.argmax())
            below = scores[best + 1] if best + 1 < len(scores) else 0.0
            row |= {
                "average_precision": float(precisions[number]),
                "threshold": float((np.float64(scores[best]) + max(below, 0.0)) / 2),
                "precision": float(hits[best] / said[best]),
                "recall": float(hits[best] / hits[-1]),
                "f1": float(f1[best]),
            }
        found.append(row)
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """Returns scores as text of 80 columns: `measure_multi_label`, and under "per_class" those of `per_class`.

    If more than 20 classes have images, only the 10 with the lowest and the 10 with the highest average precision
    are shown.
    """
    head = f"{'class':<28}{'images':>8}{'av. prec.':>11}{'threshold':>11}{'precision':>11}{'recall':>8}"
    table = table_of_classes(found["per_class"], head, _as_line, by="average_precision")
    lines = [*_score_lines(found), "", *table, ""]
    if "flip" in found:
        lines += ["with --flip, from each image and its mirror image:", *_score_lines(found["flip"]), ""]
    return "\n".join(lines)


def _score_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        f"mean average precision {found['mean_average_precision']:>8.2%}",
        f"all labels right       {found['accuracy']:>8.2%}",
        f"loss                   {found['loss']:>8.4f}",
    ]


def _as_line(row: Mapping[str, Any]) -> str:
    return (
        f"{pad(row['name'], 28)}{row['images']:>8,}{row['average_precision']:>11.1%}{row['threshold']:>11.4f}"
        f"{row['precision']:>11.1%}{row['recall']:>8.1%}"
    )


def read_thresholds(text: str, class_names: Sequence[str]) -> list[float]:
    """Returns the threshold of each class: a number for all, or those of a scores.json that `evaluate` wrote.

    Args:
      text: a number from 0 to 1, or the path of the file.
      class_names: of the model, as `in_words` returns them.

    Raises:
      UserError: it is neither, or the file is of other classes.
    """
    try:
        number = float(text)
    except ValueError:
        return _of_file(text, class_names)
    if not 0 <= number <= 1:
        raise UserError(f"threshold {text} is not from 0 to 1: give a probability, or a scores.json")
    return [number] * len(class_names)


def _of_file(file: str, class_names: Sequence[str]) -> list[float]:
    try:
        rows = read_json(Path(file).expanduser())["per_class"]
        given = {row["name"]: row["threshold"] for row in rows}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        pass_on(error, file)
        raise UserError(
            f"threshold {show(file)} is neither a number nor a scores.json of images with several labels: give one of them"
        ) from None
    if [*given] != [*class_names] or not all(
        value is None or (type(value) in (int, float) and 0 <= value <= 1) for value in given.values()
    ):
        raise UserError(
            f"{show(file)} does not have the thresholds of this model's classes: evaluate the model again"
        )
    return [USUAL_THRESHOLD if value is None else float(value) for value in given.values()]
