"""Pictures of what a run has learned: plain arrays in, a matplotlib Figure out.

Matplotlib is imported inside the functions, since its import looks for fonts, and never as pyplot, which
keeps global state.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.inference.scores import calibration_error, confidence_bins

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH_INCHES, _DOTS_PER_INCH = 8, 150  # 1200 px
# Beside Matplotlib's own, which has Latin, Greek, Cyrillic and Arabic; what the systems bring, and Noto's.
_FONTS_OF_MORE_SCRIPTS = (
    "Noto Sans CJK JP,Noto Sans JP,Noto Sans SC,Noto Sans KR,Noto Sans Devanagari,Noto Sans Thai,Noto Sans Bengali,"
    "Noto Sans Tamil,Hiragino Sans,Apple SD Gothic Neo,Arial Unicode MS,Microsoft YaHei,Malgun Gothic,Nirmala UI,"
    "WenQuanYi Zen Hei,Unifont"
).split(",")
_TINY = np.finfo(np.float64).tiny  # in a divisor: what is all 0 stays 0


def save(figure: "Figure", path: Path) -> None:
    """Writes a PNG of 1200 px in width, whole or not at all; UserError where it can't.

    A character that no font has becomes a box, which is said.
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
            f"{path.name}: a character that no font has is drawn as a box; a Noto font of its script would do"
        )


def token_mixing(kernel: np.ndarray, *, grid: tuple[int, int], title: str) -> "Figure":
    """What the hidden units of a token-mixing MLP look at, in pairs of opposites (paper, Figure 5).

    Takes the MLP's first kernel, float (tokens, units), and the patches' (rows, columns). A unit is a map of
    its weights. Pairs go from low to high spatial frequency; of more than 96, that many are drawn, evenly.
    """
    units = kernel.T.astype(np.float64)
    if len(units) < 2:
        raise UserError("tokens_mlp_dim=1 leaves no two units to pair: choose a run with more")
    pairs = opposites(units)
    frequency = spatial_frequency(units.reshape(-1, *grid))[pairs].mean(axis=1)
    chosen = _evenly(np.argsort(frequency, kind="stable"), 96)

    maps = units[pairs[chosen]].reshape(-1, 2, *grid)
    maps = _enlarge(maps / np.maximum(abs(maps).max(axis=(1, 2, 3), keepdims=True), _TINY))
    tiles = np.pad(maps, ((0, 0), (0, 0), (0, 0), (0, 4)), constant_values=np.nan)
    tiles = np.concatenate([tiles[:, 0], maps[:, 1]], axis=2)
    figure, axes = _sheet(tiles, frequency[chosen], columns=min(8, len(tiles)), title=title)
    axes.set_xlabel(
        f"{len(chosen)} of {len(pairs)} pairs of units, row by row from low to high spatial frequency\n"
        "(left: that of a row's first pair, in cycles per patch)"
    )
    figure.set_figheight(figure.get_figheight() + 0.6)
    bar = figure.colorbar(axes.images[0], ax=axes, location="bottom", shrink=0.6, aspect=40)
    bar.set_label("weight, relative to the largest of its pair")
    return figure


def stem(kernel: np.ndarray, *, title: str) -> "Figure":
    """The kernels that embed a patch, as small images: float (h, w, 1, 3 or 4 channels, hidden_dim).

    Each is scaled to its own range around 0, which is mid-grey; a fourth channel, alpha, isn't drawn. They go
    from low to high spatial frequency; of more than 256, that many are drawn, evenly.
    """
    patches = np.moveaxis(kernel[:, :, :3].astype(np.float64), -1, 0)
    frequency = spatial_frequency(patches)
    chosen = _evenly(np.argsort(frequency, kind="stable"), 256)

    patches = patches[chosen]
    patches = 0.5 + 0.5 * patches / np.maximum(abs(patches).max(axis=(1, 2, 3), keepdims=True), _TINY)
    channels = np.broadcast_to(np.moveaxis(patches, -1, 1), (len(patches), 3, *patches.shape[1:3]))
    tiles = np.moveaxis(_enlarge(channels), 1, -1)
    figure, axes = _sheet(tiles, frequency[chosen], columns=int(np.ceil(len(tiles) ** 0.5)), title=title)
    axes.set_xlabel(
        f"{len(chosen)} of {len(frequency)} kernels, row by row from low to high spatial frequency\n"
        "(left: that of a row's first kernel, in cycles per pixel); mid-grey is 0, scales differ"
    )
    return figure


def spatial_frequency(maps: np.ndarray) -> np.ndarray:
    """Mean frequency of maps (n, h, w) or (n, h, w, channels), weighted by power: (n,), in cycles per cell.

    From 0, of a constant map, to 0.71, of a chessboard.
    """
    n, h, w = maps.shape[:3]
    power = (abs(np.fft.fft2(maps, axes=(1, 2))) ** 2).reshape(n, h, w, -1).sum(axis=-1)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    return (power * frequency).sum(axis=(1, 2)) / np.maximum(power.sum(axis=(1, 2)), _TINY)


def opposites(units: np.ndarray) -> np.ndarray:
    """Each unit (n, d) with the one whose direction is nearest to its negative: indices (n // 2, 2).

    No unit is in two pairs: the most opposed pair is taken first, then the most opposed of the rest.
    """
    directions = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), _TINY)
    first, second = np.triu_indices(len(units), k=1)
    pairs, free = [], np.ones(len(units), bool)
    for i in np.argsort((directions @ directions.T)[first, second], kind="stable"):
        if free[first[i]] and free[second[i]]:
            pairs.append((first[i], second[i]))
            free[[first[i], second[i]]] = False
    return np.array(pairs, int).reshape(-1, 2)


# Axis -> line -> its name in metrics.jsonl
_CURVES = {
    "loss": {"train": "train/loss", "test": "test/loss"},
    "accuracy": {"train": "train/accuracy", "test": "test/accuracy", "test, top 5": "test/accuracy_top5"},
    "learning rate": {"train": "train/learning_rate"},
}


def curves(rows: Sequence[Mapping[str, float]], *, title: str) -> "Figure":
    """Loss, accuracy and learning rate over the steps of a run, from the rows of its metrics.jsonl."""
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
    """Training loss and test accuracy of several runs over their steps: name -> rows of a metrics.jsonl."""
    panels = {
        label: {name: [(row["step"], row[key]) for row in rows if key in row] for name, rows in runs.items()}
        for label, key in {"training loss": "train/loss", "test accuracy": "test/accuracy"}.items()
    }
    return _over_steps(panels, title)


def _over_steps(panels: Mapping[str, Mapping[str, list]], title: str) -> "Figure":
    """Label of the axes -> name of a line -> its points (step, value); a line without any isn't drawn."""
    figure = _figure(0.6 + 2.2 * len(panels), title)
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(grid, panels.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            if points:
                name, marker = f"{name}, last {points[-1][1]:.4g}", "." if len(points) <= 50 else ""
                axes.plot(*zip(*points, strict=True), color=f"C{number}", marker=marker, label=name)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def confusion(counts: Sequence[tuple[int, int, int]], class_names: Sequence[str]) -> "Figure":
    """Which class is taken for which, from (true, predicted, images), coloured as shares of the true class.

    Counts are written for up to 20 classes and names for up to 50; the axes of more count the classes. Of more
    than 1,000, neighbours share a cell.
    """
    from matplotlib.colors import PowerNorm

    n = len(class_names)
    true, predicted, images = np.reshape(counts, (-1, 3)).astype(int).T
    cells = min(n, 1000)
    matrix = np.zeros((cells, cells), int)
    np.add.at(matrix, (true * cells // n, predicted * cells // n), images)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    accuracy = images[true == predicted].sum() / max(images.sum(), 1)
    figure = _figure(
        7.2, f"Confusion of classes: {100 * accuracy:.2f} % of {images.sum():,} images are right"
    )
    axes = figure.add_subplot()
    # Roots, so that rare confusions show, and more so where no counts do.
    norm = PowerNorm(1 / 2 if n <= 20 else 1 / 4, 0, 1)
    image = axes.imshow(share, cmap="Blues", norm=norm, extent=(-0.5, n - 0.5, n - 0.5, -0.5))
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
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
    """The 30 mistakes made with the highest probabilities, from the highest on.

    Takes mistakes only, in any order: images uint8 (h, w, 1, 3 or 4), of any sizes, and what belongs to each.
    """
    order = np.argsort(probabilities, kind="stable")[::-1][:30]
    rows = max(-(-len(order) // 6), 1)
    title = (
        "Most confident mistakes: what an image is, and what it is taken for" if len(order) else "No mistakes"
    )
    figure = _figure(0.5 + 1.75 * rows, title)
    grid = figure.subplots(rows, 6, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, order, strict=False):
        axes.imshow(
            images[i].squeeze(-1) if images[i].shape[-1] == 1 else images[i], "gray", vmin=0, vmax=255
        )
        caption = (
            f"is {_short(true_names[i], 16)}\nsaid {_short(predicted_names[i], 16)}\n"
            f"with {100 * probabilities[i]:.1f} %"
        )
        axes.set_title(caption, fontsize=7.5, parse_math=False)
    return figure


def calibration(confidence: np.ndarray, correct: np.ndarray) -> "Figure":
    """Reliability diagram: how often predictions of a confidence are right, and how many there are.

    Takes the probability of each predicted class, float (n,), and whether it was right, bool (n,).
    """
    counts, _, right = confidence_bins(confidence, correct)
    used, left, width = counts > 0, np.arange(len(counts)) / len(counts), 1 / len(counts)
    figure = _figure(7, f"Expected calibration error: {calibration_error(confidence, correct):.4f}")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    bar = {"width": width, "align": "edge", "edgecolor": "white"}
    top.bar(left[used], right[used] / counts[used], label="share that is right", **bar)
    top.plot([0, 1], [0, 1], "--", color="C1", label="perfectly calibrated")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    top.legend(loc="upper left")
    bottom.bar(left, counts, **bar)
    bottom.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    return figure


def _figure(height_inches: float, title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    figure.suptitle(_short(title, 90), parse_math=False)
    return figure


def _sheet(tiles: np.ndarray, frequency: np.ndarray, *, columns: int, title: str) -> tuple["Figure", Any]:
    """Tiles row by row, a frequency beside each: (n, h, w) from -1 to 1, or RGB (n, h, w, 3) from 0 to 1."""
    gap_px, rows = 10, -(-len(tiles) // columns)
    around = [(0, rows * columns - len(tiles)), (0, gap_px), (0, gap_px), (0, 0)][: tiles.ndim]
    tiles = np.pad(tiles, around, constant_values=np.nan if tiles.ndim == 3 else 0.85)
    h, w, *channels = tiles.shape[1:]
    sheet = tiles.reshape(rows, columns, h, w, *channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * h, columns * w, *channels)[:-gap_px, :-gap_px]

    figure = _figure(1 + 0.92 * _WIDTH_INCHES * sheet.shape[0] / sheet.shape[1], title)
    axes = figure.add_subplot(frame_on=False)
    axes.imshow(sheet, cmap="RdBu_r", vmin=-1, vmax=1)
    middles = np.arange(rows) * h + (h - gap_px) / 2
    axes.set_yticks(middles, [f"{value:.2f}" for value in frequency[::columns]], fontsize="small")
    axes.tick_params(length=0)
    axes.set_xticks([])
    return figure, axes


def _enlarge(maps: np.ndarray) -> np.ndarray:
    """(..., h, w), each cell so many pixels that the longer side has about 60."""
    cell_px = max(60 // max(maps.shape[-2:]), 1)
    return maps.repeat(cell_px, axis=-2).repeat(cell_px, axis=-1)


def _evenly(order: np.ndarray, at_most: int) -> np.ndarray:
    return order[np.linspace(0, len(order) - 1, min(len(order), at_most)).round().astype(int)]


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
