"""From the name of weights to parameters: published names, files, URLs, the Hugging Face hub, run directories."""

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

# How weights were trained, by the layout of their file; used for files that do not say it themselves.
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

    For a published name nothing is downloaded.

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
    """Returns weights adapted to a model, as a tree of float32 numpy arrays; prints what had to be changed.

        params = model.init(key, images)["params"]
        params = pretrained.load("imagenet21k/Mixer-B_16", like=params)

    Args:
      source: a published name, file, URL, "hf-hub:OWNER/NAME" or run directory, as `pretrained --help` explains.
      like: the model's parameters, arrays or jax.ShapeDtypeStruct; a new head is copied from it.
      grid: (rows, columns) of the model's tokens; None = square. If the weights have another grid, token mixing
        is changed exactly (paper, Appendix C) or resampled: see `adapt.adapt`.
      head: "keep", "reset", or "auto": keep the head if it has the same number of classes, and the same class
        names if both are known.
      class_names: of the model, if known.

    Raises:
      UserError: the weights cannot be found, downloaded or read, or do not fit; the message lists every reason.
    """
    weights = find(source)
    theirs = weights.metadata.get("class_names")
    params, notes = adapt(
        {**weights.shapes, **dict.fromkeys(weights.unknown, ())},  # the model has no unknown names either
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
    # A file written by us describes itself best.
    metadata = weights.metadata if {"model", "preprocess"} <= weights.metadata.keys() else origin
    _check_origin(weights.name, metadata)
    return replace(weights, metadata=metadata or ASSUMED[weights.layout])


def _check_origin(name: str, metadata: Mapping[str, Any]) -> None:
    """Raises UserError for metadata that cannot be true; values that enter a config are checked with the config."""
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
        raise UserError(f"the metadata of {name} is invalid: write the file again")


def _open_run(workdir: Path) -> Weights:
    run = open_run(workdir)
    flat = flatten_dict(run.params, sep="/")
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
    """Returns what timm's `config.json` says about the weights beside it; timm's models compute erf GELU."""
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
    except (ValueError, KeyError, TypeError, IndexError):  # not written by timm
        return {}
