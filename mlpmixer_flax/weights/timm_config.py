"""Reads timm's config.json, which says how the weights beside it were trained, and compares it with them."""

# The keys are those that timm 1.0.31 writes: save_config_for_hf in models/_hub.py, PretrainedCfg in
# models/_pretrained.py, the arguments of MlpMixer in models/mlp_mixer.py. Each key is used, or compared with the
# arrays, or named in a note because it changes results and is not used. The others change no result:
# fixed_input_size, min_input_size, pool_size, test_pool_size, first_conv, classifier, custom_load, license,
# description, notes, where the weights come from, and label_descriptions (names of classes are label_names).

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import in_one_line
from mlpmixer_flax.reading import read_json
from mlpmixer_flax.weights.adapt import sizes_of
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.files import Weights

GELU_OF = {"gelu": "erf", "gelu_tanh": "tanh"}  # timm's act_layer -> model.gelu
RELATIVES = ("gmixer", "resmlp", "gmlp")  # timm's other models with some of the same names of parameters
INTERPOLATIONS = ("bilinear", "bicubic")
# What timm assumes if the file does not say it: timm/data/config.py, timm/data/constants.py
DEFAULTS = {
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
FIT_OF = {"center": "crop", "squash": "stretch", "border": "pad"}  # timm's crop_mode -> preprocess.fit
PADDED_IN_TIMM = (
    "timm pads with the mean, not with gray, and with crop_pct below 1 it crops less of the shorter side"
)
# Keys that change results, but have no counterpart here
_UNUSED = ("test_input_size", "test_crop_pct", "label_offset", "hf_hub_filename")
# Arguments of timm's MlpMixer that are used below, or that the arrays tell, or that matter only in training
_KNOWN_ARGUMENTS = {
    *(
        "act_layer",
        "global_pool",
        "num_classes",
        "img_size",
        "in_chans",
        "patch_size",
        "num_blocks",
        "embed_dim",
    ),
    *("mlp_ratio", "drop_rate", "proj_drop_rate", "drop_path_rate", "nlhb", "device", "dtype"),
}
_MAX_UNUSED = 6  # keys named in a note


class Origin(NamedTuple):
    """What a config.json says of weights."""

    metadata: dict[
        str, Any
    ]  # model, preprocess and class_names, as our own files have them; {} if not timm's
    notes: list[str]  # sentences for the user


def read(file: Path, weights: Weights) -> Origin:
    """Returns what timm's config.json says of the weights beside it.

    Raises:
      UserError: the file cannot be read, has a value of a wrong type, belongs to other weights, or says that
        the weights compute something that no MLP-Mixer computes here.
    """
    try:
        config = read_json(file)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        if not {"pretrained_cfg", "architecture"} & config.keys():
            return Origin({}, [f"{file.name} beside the weights is not timm's, and is not used"])
        return _origin(config, weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} cannot be used ({in_one_line(error)}): correct it, or remove it") from None


def _origin(config: Mapping[str, Any], weights: Weights) -> Origin:
    # Old files have all keys at the top, and labels for label_names. These three at the top come before others.
    trained = (
        config
        | config.get("pretrained_cfg", {})
        | {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    )
    arguments = config.get("model_args") or {}
    notes: list[str] = []
    _check_model(trained, arguments, weights)
    channels = sizes_of(weights.shapes).get("channels", 3)
    preprocess = {
        "image_size_px": _image_size_px(trained, arguments, weights, notes),
        "interpolation": _interpolation(trained, notes),
        "crop_fraction": _crop_fraction(trained),
        "fit": _fit(trained, notes),
        **{key: _per_channel(key, trained, channels, notes) for key in ("mean", "std")},
    }
    metadata = {
        "model": {"gelu": _gelu(trained, arguments, weights, notes)},
        "preprocess": {key: value for key, value in preprocess.items() if value is not None},
    }
    if class_names := _class_names(trained, weights, notes):
        metadata["class_names"] = class_names
    unused = {key: trained.get(key) for key in _UNUSED}
    unused |= {f"model_args.{key}": arguments[key] for key in arguments.keys() - _KNOWN_ARGUMENTS}
    listed = [
        f"{key}={value!r:.40}" for key, value in sorted(unused.items()) if value not in (None, False, "")
    ]
    if listed:
        more = f" and {len(listed) - _MAX_UNUSED} more" if len(listed) > _MAX_UNUSED else ""
        notes.append(f"not used, although timm uses it: {', '.join(listed[:_MAX_UNUSED])}{more}")
    return Origin(metadata, [f"config.json: {note}" for note in notes])


def _check_model(trained: Mapping[str, Any], arguments: Mapping[str, Any], weights: Weights) -> None:
    """Checks that the config belongs to these weights and that they are an MLP-Mixer's."""
    architecture = trained.get("architecture") or ""
    if architecture.startswith(RELATIVES):
        raise UserError(f"{architecture!r:.60} is not an MLP-Mixer: give other weights")
    pool = arguments.get("global_pool", trained.get("global_pool", "avg"))
    if pool not in ("avg", None) and "head/kernel" in weights.shapes:
        raise UserError(
            f"global_pool={pool!r} is not the mean over tokens, which every model here uses: give other weights"
        )
    sizes, patch = sizes_of(weights.shapes), arguments.get("patch_size")
    stated = {
        "num_classes": ("classes", trained.get("num_classes") or None),  # 0 = no head
        "num_features": ("hidden_dim", trained.get("num_features")),
        "embed_dim": ("hidden_dim", arguments.get("embed_dim")),
        "num_blocks": ("num_blocks", arguments.get("num_blocks")),
        "patch_size": (
            "patches.size",
            (patch, patch) if isinstance(patch, int) else tuple(patch or ()) or None,
        ),
    }
    for key, (size, value) in stated.items():
        if value is not None and value != sizes.get(size, value):
            raise UserError(
                f"{key}={value}, but in the arrays of {weights.name} it is {sizes[size]}, so the two do not belong "
                "together: take the config.json of these weights, or remove it"
            )


def _gelu(
    trained: Mapping[str, Any], arguments: Mapping[str, Any], weights: Weights, notes: list[str]
) -> str:
    layer = arguments.get("act_layer") or trained.get("act_layer")  # the second from inference/hub_folder.py
    if layer:
        if layer not in GELU_OF:
            raise UserError(
                f"act_layer={layer!r:.60} is not a GELU, which every model here uses: give other weights"
            )
        return GELU_OF[layer]
    # timm's own files of Google's weights do not say that these were trained with tanh GELU. Weights that were
    # fine-tuned from them with timm have the same tag, but other classes or, from new versions, model_args.
    name = f"hf-hub:timm/{trained.get('architecture')}.{trained.get('tag')}"
    published = PUBLISHED.get(name)
    classes = sizes_of(weights.shapes).get("classes")
    if published and not arguments and classes == published.num_classes and published.gelu != "erf":
        notes.append(f"model.gelu={published.gelu}, because these are the weights {name}; timm computes erf")
        return published.gelu
    return "erf"


def _image_size_px(
    trained: Mapping[str, Any], arguments: Mapping[str, Any], weights: Weights, notes: list[str]
) -> int | None:
    """Returns the side of the images, from the arrays if they contradict the config."""
    stated = arguments.get("img_size") or (trained.get("input_size") or [None])[1:]
    height, width = (stated, stated) if isinstance(stated, int) else stated or (None, None)
    if height != width:
        raise UserError(
            f"images of {height}x{width} px are not square, but every model here takes square images: give other weights"
        )
    sizes = sizes_of(weights.shapes)
    channels = arguments.get("in_chans") or (trained.get("input_size") or [None])[0]
    # Old versions of timm wrote the input size of the weights that a model was made from (see _parse_model_cfg).
    if channels not in (None, sizes.get("channels", channels)):
        notes.append(
            f"{channels} channels are stated, but the arrays take {sizes['channels']}, which is used"
        )
    if not {"tokens", "patches.size"} <= sizes.keys():
        return height
    patch = sizes["patches.size"]
    side_px = math.isqrt(sizes["tokens"] * math.prod(patch))
    if (side_px // patch[0]) * (side_px // patch[1]) != sizes["tokens"]:
        raise UserError(
            f"{sizes['tokens']} tokens of {patch[0]}x{patch[1]} px are no square image, but every model here takes "
            "square images: give other weights"
        )
    if height not in (None, side_px):
        notes.append(f"images of {height} px are stated, but the arrays take {side_px} px, which is used")
    return side_px


def _interpolation(trained: Mapping[str, Any], notes: list[str]) -> str:
    stated = trained.get("interpolation") or DEFAULTS["interpolation"]
    if stated in INTERPOLATIONS:
        return stated
    notes.append(
        f"images were resized with interpolation={stated!r:.40}; bicubic is used, as the nearest one here"
    )
    return "bicubic"


def _crop_fraction(trained: Mapping[str, Any]) -> float:
    fraction = float(trained.get("crop_pct") or DEFAULTS["crop_pct"])
    if not 0 < fraction <= 1:
        raise UserError(
            f"crop_pct={fraction} is not above 0 and at most 1: correct it, or give other weights"
        )
    return fraction


def _fit(trained: Mapping[str, Any], notes: list[str]) -> str | None:
    """Returns how images became squares, or None for the usual central crop."""
    mode = trained.get("crop_mode") or DEFAULTS["crop_mode"]
    if mode not in FIT_OF:
        notes.append(f"crop_mode={mode!r:.40} is unknown; the centre of images is cropped")
        return None
    fit = FIT_OF[mode]
    if fit == "crop":
        return None
    notes.append(
        f"crop_mode={mode!r} is preprocess.fit={fit!r} here" + f" ({PADDED_IN_TIMM})" * (fit == "pad")
    )
    return fit


def _per_channel(key: str, trained: Mapping[str, Any], channels: int, notes: list[str]) -> tuple[float, ...]:
    """Returns mean or std: one value, or one per channel of the weights."""
    stated = trained.get(key)
    if stated is None:
        stated = DEFAULTS[key]
        notes.append(f"{key} is not stated; timm's default is used, {stated}")
    values = tuple(float(value) for value in (stated if isinstance(stated, (list, tuple)) else [stated]))
    if not values or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
        raise UserError(f"{key}={stated!r:.60} cannot be used: correct it, or give other weights")
    if len(values) in (1, channels):
        return values
    average = sum(values) / len(values)
    if max(values) > min(values):  # as timm does
        notes.append(f"{key}={values} does not fit {channels} channels; its average {average:.4g} is used")
    return (average,)


def _class_names(trained: Mapping[str, Any], weights: Weights, notes: list[str]) -> list[str]:
    """Returns the class names in the order of the head's outputs; [] if they are not stated or do not fit."""
    stated = trained.get("label_names") or trained.get("labels") or trained.get("id2label")
    count = sizes_of(weights.shapes).get("classes")
    if not stated or count is None:
        return []
    if isinstance(stated, Mapping):  # number -> name; numbers may be left out
        names = {int(number): str(name) for number, name in stated.items()}
        if all(0 <= number < count for number in names):
            return [names.get(number, str(number)) for number in range(count)]
    elif isinstance(stated, list) and len(stated) == count:
        return [str(name) for name in stated]
    notes.append(f"label_names has {len(stated):,} names for {count:,} classes, and is not used")
    return []
