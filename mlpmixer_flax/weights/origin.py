"""Says how weights were trained: from their file, from what is known of it, or from its layout."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.adapt import sizes_of
from mlpmixer_flax.weights.files import Weights

# How weights were trained, assumed from the layout of their file if nothing else says it.
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
_SECTIONS = ("model", "preprocess")


def with_origin(weights: Weights, known: Mapping[str, Any]) -> Weights:
    """Returns weights whose metadata has all that says how they were trained.

    A file that we wrote describes itself best. Then comes `known`, and then the layout. Notes list the values
    that are only assumed, and those in which the file and `known` differ.

    Args:
      weights: as opened; their metadata is that of the file.
      known: the same from elsewhere, such as timm's config.json; {} = nothing.

    Raises:
      UserError: a value has the wrong type, or the file says other sizes of itself than its arrays have.
    """
    own, assumed = weights.metadata, ASSUMED[weights.layout]
    _check(weights.name, own)
    _check(weights.name, known)
    _check_sizes(weights)
    metadata, lacking, differing = {**known, **own}, [], []
    for section in _SECTIONS:
        theirs, elsewhere = own.get(section, {}), known.get(section, {})
        metadata[section] = {**assumed[section], **elsewhere, **theirs}
        lacking += [
            f"{section}.{key}={value}"
            for key, value in assumed[section].items()
            if key not in {**elsewhere, **theirs}
        ]
        differing += [
            f"{section}.{key}={theirs[key]!r:.40} instead of {elsewhere[key]!r:.40}"
            for key in theirs
            if comparable(theirs[key]) != comparable(elsewhere.get(key, theirs[key]))
        ]
    if "class_names" in own and list(own["class_names"]) != list(
        known.get("class_names", own["class_names"])
    ):
        differing.append("other class_names")
    notes = list(weights.notes)
    if differing:
        notes.append(
            f"the file contradicts the config.json beside it, and is believed: {', '.join(differing)}"
        )
    if lacking:
        notes.append(
            f"the weights do not say how they were trained; assumed from their layout: {', '.join(lacking)}"
        )
    return replace(weights, metadata=metadata, notes=tuple(notes))


def comparable(value: Any) -> Any:
    """Returns a list as a tuple, and equal values of all channels as one."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(value[:1] if all(element == value[0] for element in value) else value)


def _check(name: str, metadata: Mapping[str, Any]) -> None:
    """Raises UserError for metadata of the wrong types; values that enter a config are checked with the config."""
    model, preprocess = metadata.get("model", {}), metadata.get("preprocess", {})
    class_names, sizes = metadata.get("class_names", []), metadata.get("resolutions_px", [])
    valid = (
        isinstance(model, Mapping)
        and isinstance(model.get("gelu", ""), str)
        and model.get("dtype", "float32") in ("float32", "bfloat16")
        and isinstance(preprocess, Mapping)
        and isinstance(size_px := preprocess.get("image_size_px", 1), int)
        and size_px > 0
        and isinstance(class_names, (list, tuple))
        and all(isinstance(class_name, str) for class_name in class_names)
        and isinstance(sizes, list)
        and all(type(size_px) is int and size_px > 0 for size_px in sizes)
    )
    if not valid:
        raise UserError(f"the metadata of {name} is invalid: restore it, or write it again")


def _check_sizes(weights: Weights) -> None:
    """Raises UserError if a file's own metadata contradicts its arrays: somebody changed one of them."""
    model, sizes = weights.metadata.get("model", {}), sizes_of(weights.shapes)
    stated = {key: (model.get(key), sizes.get(key)) for key in sizes.keys() & model}
    stated["num_classes"] = weights.metadata.get("num_classes"), sizes.get("classes")
    for key, (value, found) in stated.items():
        if value is not None and found is not None and value != found:
            raise UserError(
                f"the metadata of {weights.name} says {key}={value!r:.40}, but its arrays have {found}: write the "
                "file again"
            )
