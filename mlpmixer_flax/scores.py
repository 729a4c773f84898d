"""What a model's answers to a split are worth: classes matched, scores, the table of classes. No JAX.

`rows` is a dict of arrays with a row for each image: `label` int (n,), `best` int (n, up to 5), the classes from the
likeliest on, `confidence` float (n,), the probability of the first of them, and `loss` float (n,).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.figures import calibration_error
from mlpmixer_flax.terminal import pad, shorten

Rows = Mapping[str, np.ndarray]


def match_classes(theirs: Sequence[str], ours: Sequence[str]) -> np.ndarray:
    """The class of a model for each class of a dataset: int32 (classes,).

    They are matched by name; by number where the names of a side are but its numbers, "0", "1", ...

    Raises:
      UserError: the two have another number of classes, or other names.
    """
    if len(theirs) != len(ours):
        raise UserError(
            f"the images are of {len(theirs)} classes and the model's are {len(ours)}: choose a dataset of the "
            "model's classes"
        )
    numbers = [str(number) for number in range(len(ours))]
    by_name, ours_by_name = (sorted(range(len(names)), key=names.__getitem__) for names in (theirs, ours))
    matched = np.arange(len(ours), dtype=np.int32)
    if sorted(theirs) == sorted(ours):
        matched[by_name] = ours_by_name
    elif numbers not in (list(theirs), list(ours)):
        only_theirs, only_ours = (
            ", ".join(map(repr, sorted(set(names) - set(others))[:3]))
            for names, others in ((theirs, ours), (ours, theirs))
        )
        raise UserError(
            f"the classes of the images are not the model's (only the images have {only_theirs}, only the model "
            f"has {only_ours}): choose a dataset of the model's classes, or rename them"
        )
    return matched


def measure(rows: Rows) -> dict[str, float]:
    """`accuracy`, `accuracy_top5` and `calibration_error` in [0, 1], and `loss`: over all images."""
    right = rows["best"] == rows["label"][:, None]
    return {
        "accuracy": float(right[:, 0].mean()),
        "accuracy_top5": float(right.any(axis=1).mean()),
        "loss": float(rows["loss"].mean(dtype=np.float64)),
        "calibration_error": calibration_error(rows["confidence"], right[:, 0]),
    }


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
