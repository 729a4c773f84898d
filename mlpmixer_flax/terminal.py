"""Names in the columns of a terminal, whatever their script."""

import unicodedata


def width(text: str) -> int:
    """How many columns a text takes: two a character in Chinese, none an accent of its own."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def printable(text: str) -> str:
    """The text; escaped, where a terminal would act on a character instead of showing it."""
    return text if text.isprintable() else repr(text)[1:-1]


def shorten(name: str, columns: int) -> str:
    """A name whole, its first synonym where that doesn't fit (ImageNet's have some), or the start of it."""
    name = printable(name)
    if width(name) > columns:
        name = name.split(", ")[0]
    while width(name) > columns:
        name = name[:-2] + "…"
    return name


def pad(name: str, columns: int) -> str:
    """`shorten`, filled with spaces on the right."""
    name = shorten(name, columns)
    return name + " " * (columns - width(name))
