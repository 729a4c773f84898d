"""Short texts for people: any name on one line, lists that do not grow without bound, and columns of a terminal.

A Chinese character needs two columns, a combining accent none.
"""

import textwrap
import unicodedata
from collections.abc import Collection, Iterable

from rich.cells import cell_len, set_cell_size


def listed(items: Collection[str], limit: int = 10) -> str:
    """Returns the first `limit` items and the number of the others: "a, b and 3 more"."""
    shown = ", ".join(list(items)[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"


def quoted(names: Collection[str], limit: int = 10) -> str:
    """Returns the first `limit` names, sorted and in quotes, and the number of the others."""
    return listed([shorten(repr(name), 120) for name in sorted(names)], limit)


def printable(text: str, *, but: str = "") -> str:
    """Returns the text with escapes for characters that control the terminal or cannot be encoded, except those of `but`."""
    if text.isprintable():
        return text
    # Spaces of other scripts, and what joins letters or emoji, do not count as printable.
    but += "\u200c\u200d"
    return "".join(
        one if one.isprintable() or one in but or unicodedata.category(one) == "Zs" else repr(one)[1:-1]
        for one in text
    )


def wrap(text: str) -> str:
    """Returns a text in lines of at most 79 columns, broken at spaces; all but the first are indented."""
    return textwrap.fill(text, 79, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def shorten(text: str, columns: int) -> str:
    """Returns the text made printable, or its start and "…" if it needs more columns of a terminal."""
    text = printable(text)
    return text if fitting(text, columns) == len(text) else text[: fitting(text, columns - 1)] + "…"


def shorten_start(text: str, columns: int) -> str:
    """Returns the text, or "…" and its end if it needs more columns: for paths, whose end says most."""
    text = printable(text)
    if fitting(reversed(text), columns) == len(text):
        return text
    return "…" + text[len(text) - fitting(reversed(text), columns - 1) :]


def fitting(characters: Iterable[str], columns: int) -> int:
    """Returns how many of the first characters fit into this many columns; looks at no more of them."""
    count = 0
    for character in characters:
        columns -= cell_len(character)
        if columns < 0:
            break
        count += 1
    return count


def pad(text: str, columns: int) -> str:
    """Returns the text in exactly this many columns: shortened, or filled with spaces on the right."""
    return set_cell_size(shorten(text, columns), columns)
