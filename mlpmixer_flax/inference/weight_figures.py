"""Draws the weights of a model: numpy arrays in, a matplotlib Figure out, for `drawing.save`."""

from typing import TYPE_CHECKING

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.drawing import WIDTH_INCHES, new_figure, remove_blank_strips

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TINY = np.finfo(np.float64).tiny  # in a divisor, so that zeros stay zeros


def token_mixing(kernel: np.ndarray, *, grid: tuple[int, int], title: str) -> "Figure":
    """Draws the hidden units of a token-mixing MLP in pairs with opposite weights (paper, Figure 5).

    A unit is drawn as a map of its weights. Pairs are ordered from low to high spatial frequency; of more
    than 96 pairs, 96 are drawn, evenly spaced in this order.

    Args:
      kernel: float (tokens, units), the kernel of the MLP's first layer.
      grid: (rows, columns) of the tokens.

    Raises:
      UserError: there is only one unit.
    """
    units = kernel.T.astype(np.float64)
    if len(units) < 2:
        raise UserError(
            "tokens_mlp_dim=1 gives one hidden unit, and this figure needs pairs: choose a model with more units"
        )
    pairs = opposites(units)
    frequency = spatial_frequency(units.reshape(-1, *grid))[pairs].mean(axis=1)
    chosen = _evenly(np.argsort(frequency, kind="stable"), 96)

    maps = units[pairs[chosen]].reshape(-1, 2, *grid)
    maps = _enlarge(maps / np.maximum(abs(maps).max(axis=(1, 2, 3), keepdims=True), _TINY))
    tiles = np.pad(maps, ((0, 0), (0, 0), (0, 0), (0, 4)), constant_values=np.nan)
    tiles = np.concatenate([tiles[:, 0], maps[:, 1]], axis=2)
    figure, axes = _sheet(tiles, frequency[chosen], columns=min(8, len(tiles)), title=title)
    axes.set_ylabel("cycles per patch", fontsize="small")
    caption = [f"{len(chosen)} of {len(pairs)} pairs of units, row by row from low to high spatial frequency"]
    caption += ["(on the left: that of the first pair in the row)"]
    axes.set_xlabel("\n".join(caption + _note_on_noise(frequency, grid)))
    bar = figure.colorbar(axes.images[0], ax=axes, location="bottom", shrink=0.6, aspect=40)
    bar.set_label("weight, divided by the largest weight of the pair")
    remove_blank_strips(figure)
    return figure


def stem(kernel: np.ndarray, *, title: str) -> "Figure":
    """Draws the kernels of the patch embedding as small images.

    Each kernel is scaled to its own range around 0, which is drawn as gray. Kernels are ordered from low to
    high spatial frequency; of more than 256 kernels, 256 are drawn, evenly spaced in this order.

    Args:
      kernel: float (h, w, channels, hidden_dim), for 1, 3 or 4 channels; the fourth, alpha, is not drawn.
    """
    patches = np.moveaxis(kernel[:, :, :3].astype(np.float64), -1, 0)
    frequency = spatial_frequency(patches)
    chosen = _evenly(np.argsort(frequency, kind="stable"), 256)

    patches = patches[chosen]
    patches = 0.5 + 0.5 * patches / np.maximum(abs(patches).max(axis=(1, 2, 3), keepdims=True), _TINY)
    channels = np.broadcast_to(np.moveaxis(patches, -1, 1), (len(patches), 3, *patches.shape[1:3]))
    tiles = np.moveaxis(_enlarge(channels), 1, -1)
    # Nearly a square, with as few empty places as possible in the last row.
    side = int(np.ceil(len(tiles) ** 0.5))
    columns = min(range(side, 2 * side), key=lambda columns: -len(tiles) % columns)
    figure, axes = _sheet(tiles, frequency[chosen], columns=columns, title=title)
    axes.set_ylabel("cycles per pixel", fontsize="small")
    caption = [f"{len(chosen)} of {len(frequency)} kernels, row by row from low to high spatial frequency"]
    caption += [
        "(on the left: that of the first kernel in the row); gray is 0; each kernel has its own scale"
    ]
    axes.set_xlabel("\n".join(caption + _note_on_noise(frequency, kernel.shape[:2])))
    remove_blank_strips(figure)
    return figure


def spatial_frequency(maps: np.ndarray) -> np.ndarray:
    """Returns the mean frequency of each map, weighted by power: (n,), in cycles per cell.

    It is 0 for a constant map and 0.71 for a chessboard. `maps` are (n, h, w) or (n, h, w, channels).
    """
    n, h, w = maps.shape[:3]
    power = (abs(np.fft.fft2(maps, axes=(1, 2))) ** 2).reshape(n, h, w, -1).sum(axis=-1)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    return (power * frequency).sum(axis=(1, 2)) / np.maximum(power.sum(axis=(1, 2)), _TINY)


def opposites(units: np.ndarray) -> np.ndarray:
    """Pairs each unit with one whose direction is nearly its negative; returns indices (n // 2, 2).

    `units` are (n, d). Each unit is in at most one pair: the pair with the most opposite directions is taken
    first, then the most opposite of the remaining ones.
    """
    directions = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), _TINY)
    first, second = np.triu_indices(len(units), k=1)
    pairs, free = [], np.ones(len(units), bool)
    for i in np.argsort((directions @ directions.T)[first, second], kind="stable"):
        if free[first[i]] and free[second[i]]:
            pairs.append((first[i], second[i]))
            free[[first[i], second[i]]] = False
    return np.array(pairs, int).reshape(-1, 2)


def _note_on_noise(frequency: np.ndarray, shape: tuple[int, ...]) -> list[str]:
    """Returns a line of a caption if maps (h, w) have the mean frequency of random ones, within 10 %; else none.

    Weights begin as noise, all frequencies of which have the same power.
    """
    h, w = shape
    of_noise = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)).mean()
    if abs(frequency.mean() - of_noise) >= 0.1 * of_noise:
        return []
    return [
        "This looks like noise, as before training; that is normal in a small model and after a short run"
    ]


def _sheet(tiles: np.ndarray, frequency: np.ndarray, *, columns: int, title: str) -> tuple["Figure", "Axes"]:
    """Draws tiles row by row, with the frequency of the first tile beside each row.

    Tiles are (n, h, w) from -1 to 1, or RGB (n, h, w, 3) from 0 to 1.
    """
    gap_px, rows = 10, -(-len(tiles) // columns)
    around = [(0, rows * columns - len(tiles)), (0, gap_px), (0, gap_px), (0, 0)][: tiles.ndim]
    tiles = np.pad(tiles, around, constant_values=np.nan if tiles.ndim == 3 else 0.85)
    h, w, *channels = tiles.shape[1:]
    sheet = tiles.reshape(rows, columns, h, w, *channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * h, columns * w, *channels)[:-gap_px, :-gap_px]

    # Higher than it needs to be, so that the width decides the size of the image.
    figure = new_figure(3 + WIDTH_INCHES * sheet.shape[0] / sheet.shape[1], title)
    axes = figure.add_subplot(frame_on=False)
    axes.imshow(sheet, cmap="RdBu_r", vmin=-1, vmax=1)
    middles = np.arange(rows) * h + (h - gap_px) / 2
    axes.set_yticks(middles, [f"{value:.2f}" for value in frequency[::columns]], fontsize="small")
    axes.tick_params(length=0)
    axes.set_xticks([])
    return figure, axes


def _enlarge(maps: np.ndarray) -> np.ndarray:
    """Returns maps (..., h, w) with each cell enlarged, so that the longer side has about 60 pixels."""
    cell_px = max(60 // max(maps.shape[-2:]), 1)
    return maps.repeat(cell_px, axis=-2).repeat(cell_px, axis=-1)


def _evenly(order: np.ndarray, at_most: int) -> np.ndarray:
    return order[np.linspace(0, len(order) - 1, min(len(order), at_most)).round().astype(int)]
