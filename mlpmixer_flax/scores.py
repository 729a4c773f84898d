"""What a model's answers to a split are worth: classes matched, scores, the table of classes. No JAX.

`rows` is a dict of arrays with a row for each image: `label` int (n,), `best` int (n, up to 5), the classes from the
likeliest on, `confidence` float (n,), the probability of the first of them, and `loss` float (n,).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.terminal import pad, shorten

Rows = Mapping[str, np.ndarray]


def match_classes(theirs: Sequence[str], ours: Sequence[str], *, numbered: bool = True) -> np.ndarray:
    """The class of a model for each class of a dataset, which may have some of them only: int32 (classes,).

    They are matched by name. Where they are as many, and the names of a side are but its numbers, "0", "1", ...,
    they are matched by number, and that is said; unless the numbers of the dataset's classes mean nothing, as in
    a folder: give `numbered=False`.

    Raises:
      UserError: the dataset has other classes than the model.
    """
    if list(theirs) == list(ours):
        return np.arange(len(ours), dtype=np.int32)
    number_of = {name: number for number, name in enumerate(ours)}
    times = Counter(ours)
    unknown = [name for name in theirs if times[name] != 1]
    if not unknown:
        return np.array([number_of[name] for name in theirs], np.int32)
    numbers = [str(number) for number in range(len(ours))]
    if numbered and len(theirs) == len(ours) and numbers in (list(theirs), list(ours)):
        print("classes are matched by number: the names of the images' or the model's aren't known")
        return np.arange(len(ours), dtype=np.int32)
    raise UserError(
        f"the images are of {len(theirs)} classes, with {', '.join(map(repr, unknown[:3]))}, which name none of "
        f"the model's {len(ours)}, such as {', '.join(map(repr, ours[:3]))}: choose a dataset of the model's classes, or "
        "rename them"
    )


def measure(rows: Rows) -> dict[str, float]:
    """`accuracy`, `accuracy_top5` and `calibration_error` in [0, 1], and `loss`: over all images."""
    right = rows["best"] == rows["label"][:, None]
    return {
        "accuracy": float(right[:, 0].mean()),
        "accuracy_top5": float(right.any(axis=1).mean()),
        "loss": float(rows["loss"].mean(dtype=np.float64)),
        "calibration_error": calibration_error(rows["confidence"], right[:, 0]),
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error, 0 to 1, over 15 bins of equal width (arXiv 1706.04599, eq. 3)."""
    counts, expected, right = confidence_bins(confidence, correct)
    return float(abs(expected - right).sum() / counts.sum())


def confidence_bins(confidence, correct) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In each of 15 bins, (0, 1/15] to (14/15, 1]: how many, the sum of confidences, how many are right."""
    edges = np.linspace(0, 1, 16)
    # Softmax rounds to 0 or past 1.
    confidence = np.clip(np.asarray(confidence, np.float64), np.finfo(np.float64).tiny, 1)
    bins = np.digitize(confidence, edges, right=True) - 1
    return tuple(np.bincount(bins, weights, minlength=15) for weights in (None, confidence, correct))


def confusions(rows: Rows) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) wherever there are images, from the most images on."""
    pairs, counts = np.unique(np.stack([rows["label"], rows["best"][:, 0]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return list(zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True))


def per_class(rows: Rows, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class its number, name, images, accuracy and the other class that these are most often taken for.

    `accuracy` is None for a class without images; `taken_for` is None, and `times` 0, for one without mistakes.
    """
    classes = [
        {"class": number, "name": name, "images": 0, "accuracy": None, "taken_for": None, "times": 0}
        for number, name in enumerate(class_names)
    ]
    right = [0] * len(classes)
    for true, predicted, images in confusions(rows):
        row = classes[true]
        row["images"] += images
        if true == predicted:
            right[true] = images
        elif not row["times"]:  # the most images come first
            row |= {"taken_for": class_names[predicted], "times": images}
    for row in classes:
        if row["images"]:
            row["accuracy"] = right[row["class"]] / row["images"]
    return classes


def confident_mistakes(rows: Rows, count: int = 30) -> np.ndarray:
    """The images, by index, that are wrong with the highest confidence, from the highest on."""
    wrong = np.flatnonzero(rows["best"][:, 0] != rows["label"])
    return wrong[np.argsort(-rows["confidence"][wrong], kind="stable")[:count]]


def as_table(classes: Sequence[Mapping[str, Any]]) -> str:
    """`per_class` as text of 80 columns, without classes that have no images.

    Of more than 20 classes these are the 10 worst and the 10 best.
    """
    head = f"{'class':<28}{'images':>8}{'accuracy':>10}  most often taken for (times)"
    seen = [row for row in classes if row["images"]]
    if len(seen) <= 20:
        return "\n".join([head, *map(_as_line, seen)])
    ranked = [_as_line(row) for row in sorted(seen, key=lambda row: row["accuracy"])]
    worst, best = ranked[:10], ranked[:-11:-1]
    return "\n".join([f"the 10 worst of {len(seen):,} classes", head, *worst, "", "the 10 best", head, *best])


def _as_line(row: Mapping[str, Any]) -> str:
    taken_for = f"  {shorten(row['taken_for'], 22)} ({row['times']:,})" if row["times"] else ""
    return f"{pad(row['name'], 28)}{row['images']:>8,}{row['accuracy']:>10.2%}{taken_for}"
