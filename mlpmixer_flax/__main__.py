"""The programs of mlpmixer-flax, an MLP-Mixer in JAX and Flax; each has a --help."""

import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from mlpmixer_flax import quiet_ctrl_c
from mlpmixer_flax.huge_pages import use_huge_pages

PROGRAMS = {
    "train": "train a Mixer, or fine-tune published weights",
    "predict": "print the most probable classes of images",
    "evaluate": "score a model on a dataset, draw its mistakes",
    "analyze": "draw training curves and weights, measure features",
    "embed": "write features of images, find similar images",
    "export": "write a model for other programs",
    "benchmark": "measure speed and memory of training and inference",
    "summary": "print the layers of a model, their shapes and their cost",
    "pretrained": "list the published weights, and download them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program that the first argument names; without arguments, prints the list of programs."""
    name, *arguments = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in PROGRAMS:
        quiet_ctrl_c()
        return importlib.import_module(f"mlpmixer_flax.{name}").main(arguments)
    if name in ("--help", "-h"):
        print(_help())
        return 0
    close = get_close_matches(name, PROGRAMS, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(PROGRAMS)}"
    print(f"error: there is no program {name!r}: {remedy}", file=sys.stderr)
    return 2


def start() -> NoReturn:
    """Runs `main` and ends the process: the `mlpmixer` command."""
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        use_huge_pages()
    status = main()
    # Only if a program has run: importing it for a --help would take a second.
    if "mlpmixer_flax.ending" in sys.modules:
        importlib.import_module("mlpmixer_flax.ending").leave(status)
    sys.exit(status)


def _help() -> str:
    lines = [f"  mlpmixer {name:<12}{text}" for name, text in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: mlpmixer PROGRAM ...     or: python -m mlpmixer_flax.PROGRAM ...",
            "",
            __doc__ or "",
            "",
            *lines,
            "",
            "For a folder of photos, photos/<class>/*.jpg, begin with: mlpmixer train photos/",
        ]
    )


if __name__ == "__main__":
    start()
