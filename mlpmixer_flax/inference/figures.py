"""Draws training curves and scores: numbers in, a matplotlib Figure out; `save` writes it.

Matplotlib is imported inside the functions, because its import searches for fonts. Pyplot is never imported,
because it keeps global state.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.inference.scores import calibration_error, confidence_bins

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES, _DOTS_PER_INCH = 8, 150  # 1200 px
# Matplotlib's own font has Latin, Greek, Cyrillic and Arabic. These are Noto's fonts, and fonts that come
# with operating systems.
_FONTS_OF_MORE_SCRIPTS = (
    "Noto Sans CJK JP,Noto Sans JP,Noto Sans SC,Noto Sans KR,Noto Sans Devanagari,Noto Sans Thai,Noto Sans Bengali,"
    "Noto Sans Tamil,Hiragino Sans,Apple SD Gothic Neo,Arial Unicode MS,Microsoft YaHei,Malgun Gothic,Nirmala UI,"
    "WenQuanYi Zen Hei,Unifont"
).split(",")


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as a PNG file 1200 px wide; the file is complete or not written at all.

    A character that no installed font has becomes a box, and a note is printed.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib import font_manager, rcParams
    from matplotlib.text import Text

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = [*rcParams["font.family"], *(name for name in _FONTS_OF_MORE_SCRIPTS if name in installed)]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    with warnings.catch_warnings(record=True) as caught, replacing(path) as file:
        warnings.simplefilter("always")
        figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    if any("missing from font" in str(warning.message) for warning in caught):
        print(
            f"{path.name} shows some characters as boxes, because no installed font has them: install a Noto font "
            "for this language"
        )


# Axis -> line -> its name in metrics.jsonl
_CURVES = {
    "loss": {"train": "train/loss", "validation": "validation/loss", "test": "test/loss"},
    "accuracy": {
        "train": "train/accuracy",
        "validation": "validation/accuracy",
        "validation, top 5": "validation/accuracy_top5",
        "test": "test/accuracy",
        "test, top 5": "test/accuracy_top5",
    },
    "learning rate": {"train": "train/learning_rate"},
}


def curves(rows: Sequence[Mapping[str, float]], *, title: str) -> "Figure":
    """Draws loss, accuracy and learning rate over the steps of a run, from the rows of its metrics.jsonl.

    Raises:
      UserError: the rows have none of these.
    """
    found = {
        label: {name: [(row["step"], row[key]) for row in rows if key in row] for name, key in lines.items()}
        for label, lines in _CURVES.items()
    }
    panels = {label: lines for label, lines in found.items() if any(lines.values())}
    if not panels:
        raise UserError(
            "metrics.jsonl has no loss, accuracy or learning rate yet: let the run log a step first"
        )
    return _over_steps(panels, title)


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]], *, title: str) -> "Figure":
    """Draws training loss and test accuracy of several runs over their steps.

    `runs` maps the name of a run to the rows of its metrics.jsonl.
    """
    panels = {
        label: {name: [(row["step"], row[key]) for row in rows if key in row] for name, rows in runs.items()}
        for label, key in {"training loss": "train/loss", "test accuracy": "test/accuracy"}.items()
    }
    return _over_steps(panels, title)


def _over_steps(panels: Mapping[str, Mapping[str, list]], title: str) -> "Figure":
    """Draws one panel per label: name of a line -> its points (step, value). Empty lines are left out."""
    figure = new_figure(0.6 + 2.2 * len(panels), title)
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(grid, panels.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            if points:
                name, marker = f"{name}, last {points[-1][1]:.4g}", "." if len(points) <= 50 else ""
                axes.plot(*zip(*points, strict=True), color=f"C{number}", marker=marker, label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    lowest = grid[-1]
    lowest.set_xlabel("step")
    lowest.locator_params(axis="x", integer=True, min_n_ticks=1)
    lowest.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def confusion(counts: Sequence[tuple[int, int, int]], class_names: Sequence[str]) -> "Figure":
    """Draws the confusion matrix; the colour of a cell is its fraction of the images of the true class.

    Up to 20 classes, counts are written into the cells. Up to 50 classes, the axes show class names, else
    class numbers. With more than 1,000 classes, neighbouring classes share a cell.

    Args:
      counts: (true class, predicted class, number of images), as `scores.confusions` returns.
    """
    from matplotlib.colors import PowerNorm

    n = len(class_names)
    true, predicted, images = np.reshape(counts, (-1, 3)).astype(int).T
    cells = min(n, 1000)
    matrix = np.zeros((cells, cells), int)
    np.add.at(matrix, (true * cells // n, predicted * cells // n), images)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    accuracy = images[true == predicted].sum() / max(images.sum(), 1)
    figure = new_figure(
        7.2, f"Confusion matrix: {100 * accuracy:.2f} % of {images.sum():,} images are correct"
    )
    axes = figure.add_subplot()
    # A root makes rare confusions visible; a higher one is needed where no counts are written.
    norm = PowerNorm(1 / 2 if n <= 20 else 1 / 4, 0, 1)
    image = axes.imshow(share, cmap="Blues", norm=norm, extent=(-0.5, n - 0.5, n - 0.5, -0.5))
    figure.colorbar(image, ax=axes, label="fraction of the images of the true class", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if n <= 50:
        names = [_short(name, 18) for name in class_names]
        style = {"fontsize": min(9, 330 / n), "parse_math": False}
        axes.set_xticks(range(n), names, rotation=90 if len("".join(names)) > 60 else 0, **style)
        axes.set_yticks(range(n), names, **style)
    if n <= 20:
        size = min(9, 560 / (n * len(str(matrix.max()))))
        for row, column in np.argwhere(matrix):
            color = "white" if share[row, column] > 0.3 else "black"
            axes.text(column, row, f"{matrix[row, column]}", color=color, size=size, ha="center", va="center")
    return figure


def mistakes(
    images: Sequence[np.ndarray],
    true_names: Sequence[str],
    predicted_names: Sequence[str],
    probabilities: Sequence[float],
) -> "Figure":
    """Draws the 30 mistakes with the highest probabilities, highest first.

    Args:
      images: only mistakes, in any order: uint8 (h, w, c) with 1, 3 or 4 channels, of any sizes.
      true_names, predicted_names, probabilities: one per image.
    """
    order: list[int] = np.argsort(probabilities, kind="stable")[::-1][:30].tolist()
    rows = max(-(-len(order) // 6), 1)
    title = "No mistakes"
    if len(order):
        title = "Mistakes with the highest confidence: true class → predicted class"
    figure = new_figure(0.5 + 1.75 * rows, title)
    grid = figure.subplots(rows, 6, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, order, strict=False):
        axes.imshow(
            images[i].squeeze(-1) if images[i].shape[-1] == 1 else images[i], "gray", vmin=0, vmax=255
        )
        caption = (
            f"{_short(true_names[i], 18)}\n→ {_short(predicted_names[i], 16)}\n{100 * probabilities[i]:.1f} %"
        )
        axes.set_title(caption, fontsize=7.5, parse_math=False)
    return figure


def calibration(confidence: np.ndarray, correct: np.ndarray) -> "Figure":
    """Draws the reliability diagram: accuracy and number of predictions per bin of confidence.

    Args:
      confidence: float (n,), the probability of the predicted class of each image.
      correct: bool (n,), whether that class is the true one.
    """
    counts, _, right = confidence_bins(confidence, correct)
    used, left, width = counts > 0, np.arange(len(counts)) / len(counts), 1 / len(counts)
    figure = new_figure(7, f"Expected calibration error: {calibration_error(confidence, correct):.4f}")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    bar = {"width": width, "align": "edge", "edgecolor": "white"}
    top.bar(left[used], right[used] / counts[used], label="accuracy in the bin", **bar)
    top.plot([0, 1], [0, 1], "--", color="C1", label="perfectly calibrated")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.legend(loc="upper left")
    bottom.bar(left, counts, **bar)
    bottom.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    return figure


def new_figure(height_inches: float, title: str) -> "Figure":
    """Returns an empty figure of the common width, with a title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    figure.suptitle(_short(title, 90), parse_math=False)
    return figure


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
