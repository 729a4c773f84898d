"""List or download weights: python -m mlpmixer_flax.pretrained

Without a name, prints the table of published weights. With names, downloads
these weights into the cache, so that later commands need no network. The cache
is $MLPMIXER_CACHE, else mlpmixer-flax in $XDG_CACHE_HOME or ~/.cache; for names
that begin with hf-hub: it is that of huggingface_hub.

Names of weights are the same here, in --weights= and in --config.init_from=:
  imagenet21k/Mixer-B_16   published weights, by their name in the table
  weights.npz              a file: npz in Google's layout, safetensors in timm's
  https://example.org/w.npz
                           the URL of such a file; #sha256=HEX at its end makes
                           sure that the content is the one you expect
  hf-hub:OWNER/NAME        a timm model on the Hugging Face hub, with @REVISION
                           if you want a certain one; this needs
                           pip install "mlpmixer-flax[hub]"
  mixer/                   a folder with model.safetensors and config.json
  runs/b16                 a run directory: its best checkpoint; also with
                           @last, @ema or @STEP
"""

import argparse
import textwrap
from collections.abc import Sequence

from mlpmixer_flax.cli import make_parser
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.source import describe, find, load

__all__ = ["describe", "find", "load", "main", "table"]


def table() -> str:
    """Returns the published weights as text of 80 columns, one line each, and where they come from."""
    lines = [f"{'name':<36}{'MiB':>6}{'classes':>8} GELU{'mean/std':>9}{'resized':>9}{'top-1':>7}"]
    for name, weights in PUBLISHED.items():
        left = f"{name:<36}{weights.size_mib:>7}" if weights.size_mib else f"{name:<43}"
        scale = f"{weights.mean[0]:g}/{weights.std[0]:g}"
        lines.append(
            f"{left:<44}{weights.num_classes:>6} {weights.gelu:>5}{scale:>8}{weights.interpolation:>9}{weights.top1:>7}"
        )
    lines += [
        "",
        "top-1: reported accuracy on ImageNet-1k, in %. All take images of 224 px. Files:",
        f"  NAME         {PUBLISHED['imagenet1k/Mixer-B_16'].url.replace('imagenet1k/Mixer-B_16', 'NAME')}",
        "  hf-hub:NAME  model.safetensors of https://huggingface.co/NAME",
    ]
    notes: dict[str, list[str]] = {}
    for name, weights in PUBLISHED.items():
        if weights.note:
            notes.setdefault(weights.note, []).append(name)
    for note, names in notes.items():
        lines.append(textwrap.fill(f"{', '.join(names)}: {note}", 80, break_on_hyphens=False))
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser("pretrained", __doc__)
    parser.add_argument(
        "source", nargs="*", metavar="NAME", help="weights to download; without any, the table is printed"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 2 unusable input."""
    sources = parse(argv).source
    return exit_status(lambda: _run(sources), interrupted="stopped; the same command continues the download")


def _run(sources: Sequence[str]) -> None:
    for source in sources:
        weights = find(source)
        print(f"{source}: ready in {weights.name} ({len(weights.shapes)} arrays)")
    if not sources:
        print(table())


if __name__ == "__main__":
    leave(main())
