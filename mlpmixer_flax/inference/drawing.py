"""What all figures share: an empty figure with a title, text that fits, and the file.

Matplotlib is imported inside the functions, because its import searches for fonts. Pyplot is never imported,
because it keeps global state.
"""

import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.text import fitting

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


def new_figure(height_inches: float, *title: str) -> "Figure":
    """Returns an empty figure of the common width, with a title; a long line of it is wrapped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    lines = [part for line in title for part in textwrap.wrap(short(line, 170), 88, break_on_hyphens=False)]
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)
    return figure


def remove_blank_strips(figure: "Figure") -> None:
    """Lowers a figure to the height that the image in its first axes has at this width."""
    with warnings.catch_warnings(action="ignore"):  # about characters that no font has: `save` says it
        figure.draw_without_rendering()
    axes = figure.axes[0]
    blank = axes.get_position(original=True).height - axes.get_position().height
    figure.set_figheight(figure.get_figheight() * (1 - blank))


def short(text: str, columns: int) -> str:
    """Returns the text in one line, or its start, "…" and its end; a Chinese character needs two columns."""
    text = " ".join(text.split()).encode(errors="backslashreplace").decode()
    if fitting(text, columns) == len(text):
        return text
    start = text[: fitting(text, columns * 2 // 3)].rstrip()
    end = text[len(text) - fitting(reversed(text), columns - 1 - cell_len(start)) :]
    return f"{start}…{end.lstrip()}"


def percent(share: float, _: int) -> str:
    """Returns a share as text; a formatter of Matplotlib, which also gives the position of the tick."""
    return f"{100 * share:.4g} %"


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as a PNG file 1200 px wide, which also has the title as text; the file is complete or not written.

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
        title = {"Title": figure.get_suptitle()}
        figure.savefig(file, format="png", dpi=_DOTS_PER_INCH, metadata=title)
    if any("missing from font" in str(warning.message) for warning in caught):
        print(
            f"{path.name} shows some characters as boxes, because no installed font has them: install a Noto font "
            "for this language"
        )
