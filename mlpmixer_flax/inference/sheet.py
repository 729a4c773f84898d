"""Draws images beside those that are most similar to them, for `drawing.save`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlpmixer_flax.inference.drawing import WIDTH_INCHES, new_figure, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 7  # similar images in a row
MOST_ROWS = 100  # a figure may have 65,536 px


@dataclass(frozen=True)
class Cell:
    """An image of the sheet, and the lines above it."""

    image: np.ndarray  # uint8 (h, w, c) with 3 or 4 channels, of any size
    lines: tuple[str, ...]


def sheet(found: Sequence[tuple[Cell, Sequence[Cell]]], *, title: str) -> "Figure":
    """Draws, for each pair (image, similar images), the image at the left and the similar ones beside it.

    More than COLUMNS similar images take several rows.
    """
    rows: list[list[Cell | None]] = []
    for image, similar in found:
        for start in range(0, len(similar), COLUMNS):
            rows.append([None if start else image, *similar[start : start + COLUMNS]])
    width = WIDTH_INCHES / (COLUMNS + 1)
    sides = [
        [min(cell.image.shape[0] / cell.image.shape[1], 1) for cell in row if cell is not None]
        for row in rows
    ]
    heights = [width * max(row) for row in sides]
    figure = new_figure(
        0.5 + sum(heights) + 0.45 * len(rows), title, "Left: the given image; then the most similar ones"
    )
    grid = figure.subplots(len(rows), COLUMNS + 1, squeeze=False, height_ratios=heights)
    for axes in grid.ravel():
        axes.set_axis_off()
        axes.set_anchor("N")  # under its lines
    for line, row in zip(grid, rows, strict=True):
        for axes, cell in zip(line, row, strict=False):
            if cell is not None:
                axes.imshow(cell.image)
                text = "\n".join(short(each, int(15 * width)) for each in cell.lines)
                axes.set_title(text, fontsize=7, parse_math=False)
    return figure
