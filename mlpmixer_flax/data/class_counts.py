"""Describes the classes of a run in a few lines: images per class, rare classes, a class that outweighs the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from mlpmixer_flax.text import shorten

_COLUMNS = 80
_NAME_COLUMNS = 24
_MOST_LINES = 4  # for the counts of all classes; if they need more, there is a summary instead
_FEW = 10  # a class with fewer training images is rare


def describe_classes(
    class_names: Sequence[str],
    train_labels: Sequence[int] | np.ndarray | None,
    test_labels: Sequence[int] | np.ndarray | None,
    *,
    test_split: str,
) -> str:
    """Returns a text of at most eleven lines of 80 columns, to print at the start of a run.

    It says how many training images each class has, which classes are rare (fewer than 10 images, or less than a
    tenth of the median), whether one class has more than half of the images (60 % of two classes), and which classes have no image in
    the split that is evaluated during training.

    Args:
      class_names: in the order of the labels.
      train_labels, test_labels: from `Examples.known_labels`: int (n,) or uint8 (n, classes), or None if unknown.
      test_split: name of the split of `test_labels`, for the text.
    """
    lines = []
    if train_labels is None:
        lines += _wrap("classes: ", _some(class_names, 10, _short))
    else:
        counts, several = _count(train_labels, len(class_names)), np.ndim(train_labels) == 2
        # The largest class of images with several labels says little: most have other labels too.
        for describe in (_describe_counts, _describe_rare, *([_describe_largest] if not several else [])):
            lines += describe(class_names, counts)
    if test_labels is not None:
        tested = _count(test_labels, len(class_names))
        missing = [name for name, count in zip(class_names, tested, strict=True) if not count]
        if missing:
            lines += _wrap(f"without an image in split '{_short(test_split)}': ", _some(missing, 5, _short))
    return "\n".join(lines)


def _count(labels: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the number of images per class."""
    if np.ndim(labels) == 2:
        return np.asarray(labels, np.int64).sum(axis=0)
    return np.bincount(np.asarray(labels, np.int64), minlength=num_classes)


def _describe_counts(names: Sequence[str], counts: np.ndarray) -> list[str]:
    if len(names) <= 20 * _MOST_LINES:  # more need too many lines, whatever their names are
        each = [f"{_short(name)}: {count:,}" for name, count in zip(names, counts, strict=True)]
        lines = _wrap("training images per class: ", each)
        if len(lines) <= _MOST_LINES:
            return lines
    return [
        f"training images per class: {counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}, in "
        f"{len(names):,} classes"
    ]


def _describe_rare(names: Sequence[str], counts: np.ndarray) -> list[str]:
    tenth = np.median(counts) / 10
    rare = np.flatnonzero(counts < max(_FEW, tenth))
    if not len(rare):
        return []
    if len(rare) == len(names):
        return [f"every class is rare: fewer than {_FEW} training images"]
    limit = f"{_FEW} training images" if tenth <= _FEW else f"a tenth of the median, {tenth:,.0f}"
    rare = sorted(rare, key=lambda label: counts[label])
    return _wrap(
        f"rare (fewer than {limit}): ",
        _some(rare, 5, lambda label: f"{_short(names[int(label)])}: {counts[label]:,}"),
    )


def _describe_largest(names: Sequence[str], counts: np.ndarray) -> list[str]:
    largest, total = int(counts.argmax()), int(counts.sum())
    usual = 0.6 if len(names) == 2 else 0.5  # one of two classes nearly always has more than half
    if counts[largest] <= usual * total or len(names) < 2:
        return []
    name, percent = _short(names[largest]), min(99, round(100 * counts[largest] / total))
    return [
        f"{name} has {percent} % of the training images,",
        f"  so always answering {name} would be right for {percent} % of them",
    ]


def _short(name: str) -> str:
    return shorten(name, _NAME_COLUMNS)


def _some(items: Sequence[Any], limit: int, show: Callable[[Any], str]) -> list[str]:
    rest = [f"and {len(items) - limit:,} more"] if len(items) > limit else []
    return [show(item) for item in items[:limit]] + rest


def _wrap(start: str, items: list[str]) -> list[str]:
    """Returns lines of at most 80 columns: the start, then the items, separated by commas."""
    lines, line = [], start
    for number, item in enumerate(items, 1):
        text = item + (", " if number < len(items) else "")
        if cell_len(line + text.rstrip()) > _COLUMNS and line.strip() != start.strip():
            lines.append(line.rstrip())
            line = "  "
        line += text
    return [*lines, line.rstrip()]
