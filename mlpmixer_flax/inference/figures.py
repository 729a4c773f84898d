"""Draws training curves and scores: numbers in, a matplotlib Figure out, for `drawing.save`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.drawing import WIDTH_INCHES, new_figure, percent, remove_blank_strips, short
from mlpmixer_flax.inference.scores import calibration_error, confidence_bins
from mlpmixer_flax.run_weights import SCORED, score_of, sized, split_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito, who chose them so that color-blind people can tell them apart
_BLUE, _ORANGE, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"


# --- curves

Rows = Sequence[Mapping[str, float]]  # of a metrics.jsonl
_Lines = dict[str, list[tuple[float, float]]]  # name of a line -> its points (step, value)
_Style = tuple[Any, str, float]  # color, line and marker, width


def curves(rows: Rows, *, title: str, steps_per_epoch: float | None = None) -> "Figure":
    """Draws loss, accuracy and learning rate of a run over its steps, and over its epochs if their length is known.

    If images have several labels, it also draws the mean average precision. The scores of other sizes of
    config.resolutions_px are thin lines, the darker the larger.

    Raises:
      UserError: the rows have no loss, accuracy or learning rate.
    """
    found = sorted({split_size(key)[1] for row in rows for key in row} - {0})
    other_sizes = {
        f"{name}, {size_px} px": (name, size_px, shade)
        for size_px, shade in zip(found, np.linspace(0.75, 0, len(found)), strict=True)
        for name in SCORED
    }

    def at_other_sizes(score: str) -> _Lines:
        return {
            label: _points(rows, sized(f"{name}/{score}", size_px))
            for label, (name, size_px, _) in other_sizes.items()
        }

    panels = {
        "loss": at_other_sizes("loss") | {name: _points(rows, f"{name}/loss") for name in ("train", *SCORED)},
        "accuracy": at_other_sizes("accuracy")
        | {
            "train": _points(rows, "train/accuracy"),
            **{name: _points(rows, f"{name}/accuracy") for name in SCORED},
            **{f"{name}, top 5": _points(rows, f"{name}/accuracy_top5") for name in SCORED},
        },
        "mean average precision": at_other_sizes("mean_average_precision")
        | {name: _points(rows, f"{name}/mean_average_precision") for name in SCORED},
        "learning rate": {"train": _points(rows, "train/learning_rate")},
    }
    panels = {label: lines for label, lines in panels.items() if any(lines.values())}
    if not panels:
        raise UserError(
            "metrics.jsonl has no loss, accuracy or learning rate yet: let the run log a step first"
        )
    styles = {
        "train": (_BLUE, "-o", 1.5),
        "validation": (_ORANGE, "-s", 1.5),
        "validation, top 5": (_ORANGE, "--^", 1.5),
        "test": (_PURPLE, "-s", 1.5),
        "test, top 5": (_PURPLE, "--^", 1.5),
        **{label: (f"{shade:.3f}", ".-", 0.8) for label, (_, _, shade) in other_sizes.items()},
    }
    return _over_steps(panels, styles, title=title, steps_per_epoch=steps_per_epoch)


def compare(runs: Mapping[str, Rows], *, title: str, steps_per_epoch: float | None = None) -> "Figure":
    """Draws training loss, and accuracy on the split that was scored, of at most three runs; `runs` has their names."""
    scored = next((found.scored for rows in runs.values() for row in rows if (found := score_of(row))), "")
    keys = {"training loss": "train/loss", f"{scored} accuracy": f"{scored}/accuracy"}
    panels = {label: {name: _points(rows, key) for name, rows in runs.items()} for label, key in keys.items()}
    styles = dict(zip(runs, [(_BLUE, "-o", 1.5), (_ORANGE, "--s", 1.5), (_PURPLE, ":^", 1.5)], strict=False))
    return _over_steps(panels, styles, title=title, steps_per_epoch=steps_per_epoch)


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    """Returns (step, value) of each row that has the key.

    A value of training is a mean over the updates since the row before, and gets the step in their middle. The last
    such mean may be one of few updates: if it is of less than a third of the updates of the mean before it, both
    become one. Otherwise its noise, and its distance in time, would look like a change at the end of the run.
    """
    # In the order of the steps, once each, which those of a damaged file may not be.
    found = sorted({row["step"]: row[key] for row in rows if key in row}.items())
    if not key.startswith("train/"):
        return found
    starts = [0, *(step for step, _ in found)]
    means = [(start, step, value) for start, (step, value) in zip(starts, found, strict=False)]
    if len(means) > 1 and 3 * (means[-1][1] - means[-1][0]) < means[-2][1] - means[-2][0]:
        (start, middle, first), (_, end, second) = means.pop(-2), means.pop()
        mean = (first * (middle - start) + second * (end - middle)) / (end - start)
        means.append((start, end, mean))
    return [((start + 1 + step) / 2, value) for start, step, value in means]


def _over_steps(
    panels: Mapping[str, _Lines],
    styles: Mapping[str, _Style],
    *,
    title: str,
    steps_per_epoch: float | None,
) -> "Figure":
    """Draws one panel per label; lines without points are left out.

    `styles` has the color, the line and marker, and the width, of each name; lines also differ in a gray print.
    """
    figure = new_figure(1.5 + 2.1 * len(panels), title)
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    handles = {}
    for axes, (label, lines) in zip(grid, panels.items(), strict=True):
        for name, points in lines.items():
            if points:
                color, line, width = styles[name]
                size = 4 if len(points) <= 50 else 0
                (handles[name],) = axes.plot(
                    *zip(*points, strict=True), line, color=color, markersize=size, linewidth=width
                )
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if "accuracy" in label:
            axes.yaxis.set_major_formatter(percent)
    lowest = grid[-1]
    last = max(step for lines in panels.values() for points in lines.values() for step, _ in points)
    lowest.set_xlim(0, 1.02 * last)
    lowest.set_xlabel(
        "step (completed updates)\ntraining curves: mean of the updates around each point, on augmented images"
    )
    lowest.locator_params(axis="x", integer=True, min_n_ticks=1)
    lowest.xaxis.set_major_formatter("{x:,.0f}")
    if steps_per_epoch:
        epochs = grid[0].secondary_xaxis(
            "top", (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
        )
        epochs.set_xlabel("epoch")
    names = [name for name in styles if name in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=min(len(names), 5)
    )
    return figure


# --- scores


def confusion(
    counts: Sequence[tuple[int, int, int]], class_names: Sequence[str], *, title: str = ""
) -> "Figure":
    """Draws the confusion matrix; the color of a cell is its share of the images of the true class.

    Up to 20 classes, counts are written into the cells, and the color scale is linear. Up to 50 classes, the axes
    show class names, else class numbers. With more than 1,000 classes, neighboring classes share a cell.

    Args:
      counts: (true class, predicted class, number of images), as `scores.confusions` returns.
      title: what was scored: the model, the dataset and the split.
    """
    from matplotlib.colors import PowerNorm

    n = len(class_names)
    true, predicted, images = np.reshape(counts, (-1, 3)).astype(int).T
    cells = min(n, 1000)
    matrix = np.zeros((cells, cells), int)
    np.add.at(matrix, (true * cells // n, predicted * cells // n), images)
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.where(totals > 0, matrix / np.maximum(totals, 1), np.nan)
    accuracy = images[true == predicted].sum() / max(images.sum(), 1)
    figure = new_figure(
        7.4, title, f"Confusion matrix: {100 * accuracy:.2f} % of {images.sum():,} images are correct"
    )
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # shows where a class has no images
    # Without counts, the color alone must show rare confusions, and a root does.
    power, scale = (1, "linear") if n <= 20 else (1 / 4, "fourth-root")
    norm = PowerNorm(power, 0, 1)
    image = axes.imshow(share, cmap="Blues", norm=norm, extent=(-0.5, n - 0.5, n - 0.5, -0.5))
    empty = "; gray: no images" * bool((totals == 0).any())
    label = f"share of the images of the true class ({scale} color scale{empty})"
    figure.colorbar(image, ax=axes, label=label, format=percent, shrink=0.8)
    cell = f", {n // cells} to {-(-n // cells)} classes per cell" if n > cells else ""
    number = f" (number{cell})" if n > 50 else ""
    axes.set_xlabel(f"predicted class{number}")
    axes.set_ylabel(f"true class{number}")
    if n <= 50:
        names = [short(name, 20) for name in class_names]
        style = {"fontsize": min(9, 330 / n), "parse_math": False}
        upright = cell_len("".join(names)) > 60
        axes.set_xticks(range(n), names, rotation=90 if upright else 0, **style)
        axes.set_yticks(range(n), names, **style)
    if n <= 20:
        size = min(9, 560 / (n * len(str(matrix.max()))))
        for row, column in np.argwhere(matrix):
            color = "white" if share[row, column] > 0.7 else "black"
            axes.text(column, row, f"{matrix[row, column]}", color=color, size=size, ha="center", va="center")
    remove_blank_strips(figure)
    return figure


def mistakes(images: Sequence[np.ndarray], found: Sequence[Mapping[str, Any]], *, title: str) -> "Figure":
    """Draws mistakes with their files, true class, predicted class and confidence, in their order.

    Args:
      images: uint8 (h, w, c) with 3 or 4 channels, of any sizes; each is drawn in its own aspect ratio.
      found: one per image, as `scores.list_mistakes` returns.
      title: what was scored: the model, the dataset and the split.
    """
    if not images:
        return new_figure(0.7, title, "No mistakes")
    rows = -(-len(images) // 6)
    columns = -(-len(images) // rows)
    width = min(WIDTH_INCHES / columns, 3)
    sides = [min(image.shape[0] / image.shape[1], 1) for image in images]
    heights = [width * max(sides[row * columns :][:columns]) for row in range(rows)]
    figure = new_figure(
        0.5 + sum(heights) + 0.66 * rows,
        title,
        "Mistakes with the highest confidence: true class → predicted class",
    )
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for axes in grid:
        axes.set_axis_off()
        axes.set_anchor("N")  # under its caption
    for axes, image, row in zip(grid, images, found, strict=False):
        axes.imshow(image)
        lines = [row["file"].rpartition("/")[2] if row["file"] else f"image {row['image']}"]
        lines += [row["is"], f"→ {row['said']}"]
        caption = "\n".join(short(line, int(14 * width)) for line in lines)
        axes.set_title(f"{caption}\n{100 * row['confidence']:.1f} %", fontsize=7.5, parse_math=False)
    return figure


def calibration(confidence: np.ndarray, correct: np.ndarray, *, title: str = "") -> "Figure":
    """Draws the reliability diagram: accuracy and number of predictions per bin of confidence.

    A bar of accuracy is as wide as its bin if the bin has the most images, and in others narrower by the square root
    of the number of images, as the accuracy of few images is less certain. A line shows the 95 % interval (Wilson).

    Args:
      confidence: float (n,), the probability of the predicted class of each image.
      correct: bool (n,), whether that class is the true one.
      title: what was scored: the model, the dataset and the split.
    """
    counts, _, right = confidence_bins(confidence, correct)
    used, middles, width = counts > 0, (np.arange(len(counts)) + 0.5) / len(counts), 1 / len(counts)
    error = calibration_error(confidence, correct)
    figure = new_figure(
        7, title, f"Expected calibration error: {error:.4f} ({len(counts)} bins of confidence)"
    )
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    images, accuracy = counts[used], right[used] / counts[used]
    widths = 0.96 * width * np.sqrt(images / images.max())
    top.bar(middles[used], accuracy, widths, color=_BLUE, label="accuracy in the bin (wider: more images)")
    low, high = _wilson(accuracy, images)
    top.vlines(middles[used], low, high, color="black", linewidth=1, label="95 % interval of the accuracy")
    top.plot([0, 1], [0, 1], "--", color=_ORANGE, label="perfectly calibrated")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.xaxis.set_major_formatter(percent)
    top.yaxis.set_major_formatter(percent)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    bars = bottom.bar(middles, counts, 0.96 * width, color=_BLUE)
    bottom.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=7)
    bottom.margins(y=0.2)
    bottom.set(xlabel="confidence: probability of the predicted class", ylabel="number of images")
    return figure


def _wilson(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends of the 95 % interval of a share of n images, which stays in [0, 1] (Wilson 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half
