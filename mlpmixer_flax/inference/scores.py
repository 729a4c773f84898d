"""Scores a split: predicts the classes of each image, and measures over all images.

`rows` is a dict of arrays with one row per image: `label` int (n,); `best` int (n, up to 5), the most
probable classes, the most probable first; `confidence` float (n,), the probability of the first; and `loss`
float (n,).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax.data.dataset import find_dataset, is_files
from mlpmixer_flax.dataloader import Examples, TestBatches, iterate
from mlpmixer_flax.inference.classes import in_words, match_classes
from mlpmixer_flax.inference.forward import (
    RowFunction,
    Rows,
    concatenate,
    forward,
    on_all_devices,
    rows_per_batch,
)
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.training.losses import LOSSES


def open_split(
    model: Model, dataset: str, split: str, *, data_dir: str = "", skip_bad_images: bool = False
) -> tuple[Examples, np.ndarray]:
    """Returns a split for `score_images`, and the model's class for each class of the dataset: int32 (classes,).

    Raises:
      UserError: as `Model.open` and `match_classes`.
    """
    found = find_dataset(dataset, data_dir=data_dir)
    classes = match_classes(
        in_words(found.info(split)["class_names"]),
        in_words(model.class_names),
        numbered=not is_files(dataset),
    )
    return model.open(found, split, skip_bad_images=skip_bad_images), classes


def score_images(model: Model, examples: Examples, *, classes: np.ndarray, batch_size: int = 64) -> Rows:
    """Returns the `rows` of a split, in its order; labels are numbers of the model's classes.

    Several processes divide the images among them, and each returns all rows.

    `examples` and `classes` come from `open_split`. `batch_size` is rounded up to a multiple of the number of
    devices.
    """
    num_classes, loss = len(model.class_names), LOSSES[model.loss]

    def score(params, batch):
        logits = model.logits(params, batch["image"], cropped=examples.cropped)
        return {
            "label": batch["label"],
            "best": jax.lax.top_k(logits, min(5, num_classes))[1],
            "confidence": loss.probabilities(logits).max(axis=-1),
            "loss": loss.per_image(logits, jax.nn.one_hot(batch["label"], num_classes)),
        }

    return rows_of_split(score, model, examples, relabel=classes.__getitem__, batch_size=batch_size)


def rows_of_split(
    score: RowFunction,
    model: Model,
    examples: Examples,
    *,
    relabel: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
) -> Rows:
    """Returns what a function (params, batch) -> rows returns for a split, in its order; shows the progress.

    Several processes divide the images among them, and each returns all rows. `relabel` turns the labels of the
    dataset into those of the model.
    """
    batches = TestBatches(
        examples,
        batch_size=rows_per_batch(batch_size),
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    parts = []
    with (
        contextlib.closing(iterate(batches, 0, len(batches))) as stream,
        tqdm(desc="scoring", total=len(examples), unit="img", delay=2, leave=False, disable=None) as bar,
    ):
        relabelled = ({**batch, "label": relabel(batch["label"])} for batch in stream)
        for rows in forward(on_all_devices(score), model.params, relabelled):
            parts.append(rows)
            bar.update(len(rows["label"]))
    return concatenate(parts)


def list_mistakes(rows: Rows, examples: Examples, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns all wrong predictions, the most confident first; `file` is None if the dataset is one of TFDS."""
    files = examples.files
    true, predicted = rows["label"].tolist(), rows["best"][:, 0].tolist()
    return [
        {
            "image": i,
            "file": files and files[i],
            "is": names[true[i]],
            "said": names[predicted[i]],
            "confidence": float(rows["confidence"][i]),
        }
        for i in confident_mistakes(rows).tolist()
    ]


def measure(rows: Rows) -> dict[str, float]:
    """Returns `accuracy`, `accuracy_top5` and `calibration_error` in [0, 1], and `loss`, over all images.

    `balanced_accuracy` is the mean of the accuracies of all classes that have images.
    """
    right = rows["best"] == rows["label"][:, None]
    images = np.bincount(rows["label"])
    by_class = np.bincount(rows["label"], right[:, 0])[images > 0] / images[images > 0]
    return {
        "accuracy": float(right[:, 0].mean()),
        "balanced_accuracy": float(by_class.mean()),
        "accuracy_top5": float(right.any(axis=1).mean()),
        "loss": float(rows["loss"].mean(dtype=np.float64)),
        "calibration_error": calibration_error(rows["confidence"], right[:, 0]),
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Returns the expected calibration error, 0 to 1, over 15 bins of equal width (arXiv 1706.04599, eq. 3)."""
    counts, expected, right = confidence_bins(confidence, correct)
    return float(abs(expected - right).sum() / counts.sum())


def confidence_bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, per bin of confidence, the number of images, the sum of confidences, and how many are correct.

    The 15 bins are (0, 1/15] to (14/15, 1].
    """
    edges = np.linspace(0, 1, 16)
    # Softmax may round to 0 or to just above 1.
    confidence = np.clip(np.asarray(confidence, np.float64), np.finfo(np.float64).tiny, 1)
    bins = np.digitize(confidence, edges, right=True) - 1
    counts, expected, right = (
        np.bincount(bins, weights, minlength=15) for weights in (None, confidence, correct)
    )
    return counts, expected, right


def confusions(rows: Rows) -> list[tuple[int, int, int]]:
    """Returns (true class, predicted class, number of images) of all pairs that occur, most images first."""
    pairs, counts = np.unique(np.stack([rows["label"], rows["best"][:, 0]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return list(zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True))


def per_class(rows: Rows, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns, per class, its number, name, images and scores, and the class it is most often mistaken for.

    `recall` is the share of its images that are predicted as it, its accuracy; `precision` is the share of the images
    predicted as it that are of it; `f1` is their harmonic mean. Each is None if it would be 0 / 0. `taken_for` is
    None, and `times` is 0, for a class without mistakes.
    """
    classes = [
        {
            "class": number,
            "name": name,
            "images": 0,
            **dict.fromkeys(("precision", "recall", "f1")),
            "taken_for": None,
            "times": 0,
        }
        for number, name in enumerate(class_names)
    ]
    right, said = [0] * len(classes), [0] * len(classes)
    for true, predicted, images in confusions(rows):
        row = classes[true]
        row["images"] += images
        said[predicted] += images
        if true == predicted:
            right[true] = images
        elif not row["times"]:  # the most images come first
            row |= {"taken_for": class_names[predicted], "times": images}
    for row, hits, times in zip(classes, right, said, strict=True):
        parts = {
            "precision": (hits, times),
            "recall": (hits, row["images"]),
            "f1": (2 * hits, times + row["images"]),
        }
        row |= {name: above / below if below else None for name, (above, below) in parts.items()}
    return classes


def confident_mistakes(rows: Rows) -> np.ndarray:
    """Returns the indices of the wrong predictions, those with the highest confidence first."""
    wrong = np.flatnonzero(rows["best"][:, 0] != rows["label"])
    return wrong[np.argsort(-rows["confidence"][wrong], kind="stable")]


def table_of_classes(
    classes: Sequence[Mapping[str, Any]], head: str, as_line: Callable[[Mapping[str, Any]], str], *, by: str
) -> list[str]:
    """Returns the lines of a table of all classes that have images.

    If there are more than 20, only the 10 worst and the 10 best are shown, by the key `by` of their rows.
    """
    seen = [row for row in classes if row["images"]]
    if len(seen) <= 20:
        return [head, *map(as_line, seen)]
    ranked = [as_line(row) for row in sorted(seen, key=lambda row: row[by])]
    worst, best = ranked[:10], ranked[:-11:-1]
    return [f"the 10 worst of {len(seen):,} classes", head, *worst, "", "the 10 best", head, *best]
