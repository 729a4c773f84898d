"""Short texts for notes and errors: any name on one line, and lists that do not grow without bound."""

from collections.abc import Collection

from rich.cells import cell_len, chop_cells


def listed(items: Collection[str], limit: int = 10) -> str:
    """Returns the first `limit` items and the number of the others: "a, b and 3 more"."""
    shown = ", ".join(list(items)[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"


def quoted(names: Collection[str], limit: int = 10) -> str:
    """Returns the first `limit` names, sorted and in quotes, and the number of the others."""
    return listed([repr(name) for name in sorted(names)], limit)


def printable(text: str) -> str:
    """Returns the text, escaped if it has characters that control the terminal or cannot be encoded."""
    return text if text.isprintable() else repr(text)[1:-1]


def shorten(text: str, columns: int) -> str:
    """Returns the text made printable, or its start and "…" if it needs more columns of a terminal."""
    text = printable(text)
    return text if cell_len(text) <= columns else chop_cells(text, columns - 1)[0] + "…"
