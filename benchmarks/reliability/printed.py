"""Checks what programs print, for the other scripts."""

import unicodedata


def controls_terminal(text: str) -> bool:
    """Returns whether a text has a character, other than a new line, that may control a terminal or cannot be encoded.

    Spaces of other scripts do not, nor do the two characters that join letters or emoji, although Python does not call
    them printable.
    """
    return any(
        not one.isprintable() and one not in "\n\u200c\u200d" and unicodedata.category(one) != "Zs"
        for one in text
    )
