"""Weights to start from: python -m mlpmixer_flax.pretrained

Without a name: the table of published weights. With names: downloads them ahead
into the cache, $MLPMIXER_CACHE or ~/.cache/mlpmixer-flax, where every later run
finds them without a network.

Weights are named by --config.init_from= and here in the same way:
  imagenet21k/Mixer-B_16   published ones, by the name in the table
  weights.npz              a file: npz as of Google, safetensors as of timm
  https://example.org/w.npz
                           such a file; #sha256=HEX at its end pins the content
  hf-hub:OWNER/NAME        a model of timm's on the Hugging Face hub; it needs
                           pip install "mlpmixer-flax[hub]"
  runs/b16                 the directory of a run of ours
"""

import argparse
import difflib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.checkpoint import read_class_names, read_run, read_weights
from mlpmixer_flax.download import fetch
from mlpmixer_flax.fit import Params, fit
from mlpmixer_flax.published import PUBLISHED
from mlpmixer_flax.terminal import exit_status
from mlpmixer_flax.weightfiles import Weights, open_weights

# What is assumed of a file that doesn't say how its weights were trained, by its layout.
ASSUMED = {
    "google": {
        "model": {"gelu": "tanh"},
        "preprocess": {"interpolation": "bilinear", "mean": (0.5,), "std": (0.5,)},
    },
    "timm": {
        "model": {"gelu": "erf"},
        "preprocess": {"interpolation": "bicubic", "mean": (0.5,), "std": (0.5,)},
    },
}


def describe(source: str) -> Mapping[str, Any]:
    """How weights were trained: `model` and `preprocess` as in a run's config, `class_names` where known.

    Downloads nothing for published names. Raises UserError as `load`.
    """
    if source in PUBLISHED:
        return PUBLISHED[source].origin
    return find(source).metadata


def load(
    source: str,
    like: Params,
    *,
    grid: tuple[int, int] | None = None,
    head: str = "auto",
    class_names: Sequence[str] = (),
) -> Params:
    """Weights fitted to a model, as a tree of float32 numpy arrays; says aloud what had to be changed.

        params = model.init(key, images)["params"]
        params = pretrained.load("imagenet21k/Mixer-B_16", like=params)

    Args:
      source: a published name, file, URL, "hf-hub:OWNER/NAME" or run directory, as in the module's docstring.
      like: the model's parameters, arrays or jax.ShapeDtypeStruct; what a reset head is taken from.
      grid: (rows, columns) of the model's tokens; None = square. Another grid than the weights' is reached
        exactly (paper, Appendix C) or by resampling: see `fit.fit`.
      head: "keep", "reset", or "auto": keep it if it has as many classes, of the same names where both are known.
      class_names: of the model's classes, if known.

    Raises:
      UserError: the weights cannot be found, downloaded or read, or don't fit; all that doesn't is listed.
    """
    weights = find(source)
    theirs = weights.metadata.get("class_names")
    params, notes = fit(
        {**weights.shapes, **dict.fromkeys(weights.unknown, ())},  # which the model doesn't have either
        weights.read,
        like,
        grid=grid,
        source_grid=_grid(weights),
        head=head,
        same_classes=list(theirs) == list(class_names) if theirs and class_names else None,
        name=source,
    )
    if weights.metadata is ASSUMED[weights.layout]:
        assumed = ", ".join(
            f"{key}={value}" for key, value in flatten_dict(weights.metadata, sep=".").items()
        )
        notes.append(f"the file doesn't say how it was trained; assumed from its layout: {assumed}")
    for note in notes:
        print(f"{source}: {note}")
    return params


def find(source: str | Path) -> Weights:
    """The weights, none of them read yet, with all that is known of their origin as metadata; UserError as `load`."""
    source = str(source)
    if source in PUBLISHED:
        published = PUBLISHED[source]
        return _with_origin(open_weights(_fetch(published.url, published.size_mib)), published.origin)
    if source.startswith(("http://", "https://")):
        return _with_origin(open_weights(fetch(source)), {})
    if source.startswith("hf-hub:"):
        return _with_origin(open_weights(_fetch(source)), _hub_origin(source))
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _open_run(path)
        if path.exists():
            return _with_origin(open_weights(path), {})
    except (OSError, RuntimeError):  # a name too long, a home of nobody
        pass
    near = difflib.get_close_matches(source, PUBLISHED, n=2, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "python -m mlpmixer_flax.pretrained lists all names"
    )
    raise UserError(f"no weights {source!r}: it is no published name, file, run directory or URL; {hint}")


def _with_origin(weights: Weights, origin: Mapping[str, Any]) -> Weights:
    # What stands in the file itself is surest, if it is of ours.
    metadata = weights.metadata if {"model", "preprocess"} <= weights.metadata.keys() else origin
    _check_origin(weights.name, metadata)
    return replace(weights, metadata=metadata or ASSUMED[weights.layout])


def _check_origin(name: str, metadata: Mapping[str, Any]) -> None:
    """A file may claim anything of itself; the values that a config takes are checked with the config."""
    sections = [metadata.get(section, {}) for section in ("model", "preprocess")]
    size, names = (
        sections[1].get("image_size_px", 1) if isinstance(sections[1], Mapping) else 0,
        metadata.get("class_names", []),
    )
    if (
        not all(isinstance(section, Mapping) for section in sections)
        or not (isinstance(size, int) and size > 0)
        or sections[0].get("dtype", "float32") not in ("float32", "bfloat16")
        or not (isinstance(names, (list, tuple)) and all(isinstance(class_name, str) for class_name in names))
    ):
        raise UserError(f"what {name} says of its own training makes no sense: write the file again")


def _open_run(workdir: Path) -> Weights:
    config = read_run(workdir)
    which = "ema" if config["ema_decay"] else "last"  # which the run's last test accuracy is of
    _, params = read_weights(workdir, which)
    flat = flatten_dict(params, sep="/")
    return Weights(
        name=str(workdir),
        shapes={name: array.shape for name, array in flat.items()},
        unknown=(),
        metadata={
            "model": config["model"],
            "preprocess": config["preprocess"],
            "class_names": read_class_names(workdir),
            "loss": config["loss"],
        },
        layout="google",
        read=flat.__getitem__,
    )


def _grid(weights: Weights) -> tuple[int, int] | None:
    """(rows, columns) of the tokens that the weights were trained with, where they say so."""
    size = weights.metadata["preprocess"].get("image_size_px")
    patch = weights.shapes.get("stem/kernel", ())[:2]
    return tuple(size // side for side in patch) if size and patch else None


def _fetch(url: str, size_mib: float | None = None) -> Path:
    if not url.startswith("hf-hub:"):
        return fetch(url, size_mib=size_mib)
    return _hub_file(url, "model.safetensors")


def _hub_file(source: str, file: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f'{source} needs huggingface_hub: pip install "mlpmixer-flax[hub]"') from None
    repo = source.removeprefix("hf-hub:")
    try:
        here = huggingface_hub.try_to_load_from_cache(repo, file)
        return Path(here if isinstance(here, str) else huggingface_hub.hf_hub_download(repo, file))
    except Exception as error:  # the hub's, its HTTP client's, the disk's
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise UserError(
            f"cannot fetch {file} of {source} ({reason}): check the name and the network, or give a file you have"
        ) from None


def _hub_origin(source: str) -> Mapping[str, Any]:
    """What the `config.json` that timm puts beside its weights says of them; timm's models compute erf GELU."""
    file = _hub_file(source, "config.json")
    try:
        timm = json.loads(file.read_text())["pretrained_cfg"]
        return {
            "model": {"gelu": "erf"},
            "preprocess": {
                "image_size_px": timm["input_size"][-1],
                "interpolation": timm["interpolation"],
                "crop_fraction": timm.get("crop_pct", 0.875),
                "mean": tuple(timm["mean"]),
                "std": tuple(timm["std"]),
            },
        }
    except (ValueError, KeyError, TypeError, IndexError):  # not timm's
        return {}


def table() -> str:
    """The published weights as text of 80 columns, a line each, and where they come from."""
    lines = [f"{'name':<36}{'MiB':>6}{'classes':>8} GELU{'mean/std':>9}{'resized':>9}{'top-1':>7}"]
    for name, weights in PUBLISHED.items():
        left = f"{name:<36}{weights.size_mib:>7}" if weights.size_mib else f"{name:<43}"
        scale = f"{weights.mean[0]:g}/{weights.std[0]:g}"
        lines.append(
            f"{left:<44}{weights.num_classes:>6} {weights.gelu:>5}{scale:>8}{weights.interpolation:>9}{weights.top1:>7}"
        )
    lines += [
        "",
        "top-1: reported accuracy on ImageNet-1k, %. All for images of 224 px. Files:",
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
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="*", help="weights to download ahead; none = print the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 2 unusable input."""
    sources = parse(argv).source
    return exit_status(lambda: _run(sources), interrupted="stopped; the same command continues the download")


def _run(sources: Sequence[str]) -> None:
    for source in sources:
        weights = find(source)
        print(f"{source}: {len(weights.shapes)} arrays, in {weights.name}")
    if not sources:
        print(table())


if __name__ == "__main__":
    sys.exit(main())
