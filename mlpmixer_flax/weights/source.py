"""Finds and loads weights by name: published names, files, URLs, the Hugging Face hub, run directories."""

import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.rundir import open_run
from mlpmixer_flax.weights.adapt import Params, adapt
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.download import fetch
from mlpmixer_flax.weights.files import Weights, open_weights

# How weights were trained, assumed from the layout of their file if the file does not say it.
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
    """Returns how weights were trained: `model` and `preprocess` as in a run's config, `class_names` if known.

    Downloads nothing for a published name.

    Raises:
      UserError: as `load`.
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
    """Returns weights adapted to a model, as a tree of float32 numpy arrays; prints a note about each change.

        params = model.init(key, images)["params"]
        params = pretrained.load("imagenet21k/Mixer-B_16", like=params)

    Args:
      source: a published name, file, URL, "hf-hub:OWNER/NAME" or run directory; see `pretrained --help`.
      like: the model's parameters, arrays or jax.ShapeDtypeStruct; a new head is copied from it.
      grid: (rows, columns) of the model's tokens; None = square. If the weights have another grid, token
        mixing is changed exactly (paper, Appendix C) or resampled: see `adapt.adapt`.
      head: "keep", "reset", or "auto": keep the head if it has the same number of classes, and the same class
        names if both are known.
      class_names: of the model, if known.

    Raises:
      UserError: the weights cannot be found, downloaded or read, or do not fit the model; the message lists
        all reasons why they do not fit.
    """
    weights = find(source)
    theirs = weights.metadata.get("class_names")
    params, notes = adapt(
        {**weights.shapes, **dict.fromkeys(weights.unknown, ())},  # so that unknown names are reported
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
        notes.append(f"the file does not say how it was trained; assumed from its layout: {assumed}")
    for note in notes:
        print(f"{source}: {note}")
    return params


def find(source: str | Path) -> Weights:
    """Opens weights without reading any array; the metadata says how they were trained, as far as known.

    Raises:
      UserError: as `load`.
    """
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
    except (OSError, RuntimeError):  # the name is too long, or ~ has no home directory
        pass
    near = difflib.get_close_matches(source, PUBLISHED, n=2, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "python -m mlpmixer_flax.pretrained lists all names"
    )
    raise UserError(f"no weights {source!r}: not a published name, file, run directory or URL; {hint}")


def _with_origin(weights: Weights, origin: Mapping[str, Any]) -> Weights:
    # A file that we wrote describes itself best.
    metadata = weights.metadata if {"model", "preprocess"} <= weights.metadata.keys() else origin
    _check_origin(weights.name, metadata)
    return replace(weights, metadata=metadata or ASSUMED[weights.layout])


def _check_origin(name: str, metadata: Mapping[str, Any]) -> None:
    """Raises UserError for metadata of the wrong types; values that enter a config are checked with the config."""
    model, preprocess = metadata.get("model", {}), metadata.get("preprocess", {})
    class_names = metadata.get("class_names", [])
    valid = (
        isinstance(model, Mapping)
        and model.get("dtype", "float32") in ("float32", "bfloat16")
        and isinstance(preprocess, Mapping)
        and isinstance(size_px := preprocess.get("image_size_px", 1), int)
        and size_px > 0
        and isinstance(class_names, (list, tuple))
        and all(isinstance(class_name, str) for class_name in class_names)
    )
    if not valid:
        raise UserError(f"the metadata of {name} is invalid: write the file again")


def _open_run(workdir: Path) -> Weights:
    run = open_run(workdir)
    flat: dict[str, Any] = flatten_dict(run.params, sep="/")
    return Weights(
        name=str(workdir),
        shapes={name: array.shape for name, array in flat.items()},
        unknown=(),
        metadata={
            "model": run.config["model"],
            "preprocess": run.config["preprocess"],
            "class_names": run.class_names,
            "loss": run.config["loss"],
        },
        layout="google",
        read=flat.__getitem__,
    )


def _grid(weights: Weights) -> tuple[int, int] | None:
    """Returns (rows, columns) of the tokens that the weights were trained with, or None if unknown."""
    size_px = weights.metadata["preprocess"].get("image_size_px")
    kernel = weights.shapes.get("stem/kernel")
    return (size_px // kernel[0], size_px // kernel[1]) if size_px and kernel else None


def _fetch(url: str, size_mib: float | None = None) -> Path:
    if not url.startswith("hf-hub:"):
        return fetch(url, size_mib=size_mib)
    return _hub_file(url, "model.safetensors")


def _hub_file(source: str, file: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f'{source} needs huggingface_hub: run pip install "mlpmixer-flax[hub]"') from None
    repo = source.removeprefix("hf-hub:")
    try:
        here = huggingface_hub.try_to_load_from_cache(repo, file)
        return Path(here if isinstance(here, str) else huggingface_hub.hf_hub_download(repo, file))
    except Exception as error:  # of any class: from the hub, its HTTP client or the disk
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise UserError(
            f"cannot download {file} of {source} ({reason}): check the name and the network, or give a local file"
        ) from None


def _hub_origin(source: str) -> Mapping[str, Any]:
    """Returns how weights were trained, from timm's `config.json` beside them; timm's models compute erf GELU."""
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
    except (ValueError, KeyError, TypeError, IndexError):  # timm did not write it
        return {}
