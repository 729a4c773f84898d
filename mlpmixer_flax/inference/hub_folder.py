"""Writes a model as a folder that timm reads unchanged, and the Hugging Face hub shows: weights, config, card."""

import math
from pathlib import Path
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing, write_json
from mlpmixer_flax.inference.card import model_card
from mlpmixer_flax.inference.classes import in_words
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.remote import shown
from mlpmixer_flax.rundir import is_run
from mlpmixer_flax.weights.files import write_safetensors
from mlpmixer_flax.weights.hub import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from mlpmixer_flax.weights.timm_config import FIT_OF, GELU_OF, PADDED_IN_TIMM

# timm's names of sizes: (height and width of a patch in pixels, hidden_dim, num_blocks). timm creates no other sizes by name.
ARCHITECTURES: dict[tuple[int, ...], str] = {
    (32, 32, 512, 8): "mixer_s32_224",
    (16, 16, 512, 8): "mixer_s16_224",
    (32, 32, 768, 12): "mixer_b32_224",
    (16, 16, 768, 12): "mixer_b16_224",
    (32, 32, 1024, 24): "mixer_l32_224",
    (16, 16, 1024, 24): "mixer_l16_224",
}
OTHER_SIZE = "mlp_mixer"  # "architecture" of all others
TANH_IN_TIMM = "in timm, create the model with act_layer=timm.layers.GELUTanh, because the weights were trained with tanh GELU"


def write_hub(folder: Path, model: Model, *, metadata: dict[str, Any], hub_name: str = "") -> list[str]:
    """Writes model.safetensors, config.json and README.md, a model card; an existing README.md is kept.

    Args:
      folder: is created; existing weights and config.json in it are replaced.
      metadata: is stored in the weights file, for this package.
      hub_name: OWNER/NAME on the hub, for the card; "" if the folder is not uploaded.

    Returns:
      Sentences for the user.

    Raises:
      UserError: the folder is a run directory, or a file cannot be written.
    """
    check_not_a_run(folder)
    make_folder(folder)
    config, preprocess = timm_config(model), model.preprocess
    notes = write_safetensors(folder / WEIGHTS_FILE, model.params, metadata=metadata)
    with replacing(folder / CONFIG_FILE) as file:
        write_json(file, config)
    card = folder / CARD_FILE
    if card.exists():
        notes.append(f"{shown(card)} exists and is kept: remove it for a new one")
    else:
        with replacing(card) as file:
            text = model_card(model, config, name=hub_name or folder.absolute().name)
            file.write(text.encode(errors="backslashreplace"))  # names may have bytes that are not text
        notes.append(f"{shown(card)} is a model card: add the licence, and what only you know")
    if config["architecture"] == OTHER_SIZE:
        notes.append(f"timm has no name for this size: {CARD_FILE} shows how to create the model")
    elif model.module.gelu == "tanh":
        notes.append(TANH_IN_TIMM)
    same_padding = preprocess["crop_fraction"] == 1 and set(preprocess["mean"]) == {0.5}
    if preprocess["fit"] == "pad" and not same_padding:
        notes.append(f"images that are not square differ a little in timm: {PADDED_IN_TIMM}")
    return notes


def check_not_a_run(folder: Path) -> None:
    """Raises UserError if a folder to write is a run directory."""
    if is_run(folder):
        raise UserError(
            f"{shown(folder)} is a run directory, whose config.json would be replaced: choose another folder"
        )


def timm_config(model: Model) -> dict[str, Any]:
    """Returns the content of config.json: the keys that timm 1.0.31 writes, and weights/timm_config.py reads."""
    module, preprocess, channels = model.module, model.preprocess, model.channels
    patch, size_px = tuple(module.patches["size"]), preprocess["image_size_px"]
    # timm computes int(ratio * embed_dim)
    ratios = [_ratio(dim, module.hidden_dim) for dim in (module.tokens_mlp_dim, module.channels_mlp_dim)]
    arguments: dict[str, Any] = {"img_size": size_px, "in_chans": channels, "mlp_ratio": ratios}
    architecture = ARCHITECTURES.get((*patch, module.hidden_dim, module.num_blocks), OTHER_SIZE)
    if architecture == OTHER_SIZE:
        arguments |= {
            "patch_size": list(patch),
            "embed_dim": module.hidden_dim,
            "num_blocks": module.num_blocks,
        }
    config = {
        "architecture": architecture,
        "num_classes": len(model.class_names),
        "num_features": module.hidden_dim,
        "global_pool": "avg",
        "label_names": list(model.class_names),
        "act_layer": _ACT_LAYERS[module.gelu],  # not in model_args: there timm takes no text for a Mixer
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [channels, size_px, size_px],
            "fixed_input_size": True,
            "interpolation": preprocess["interpolation"],
            "crop_pct": preprocess["crop_fraction"],
            "crop_mode": _CROP_MODES[preprocess["fit"]],
            **{key: _per_channel(preprocess[key], channels) for key in ("mean", "std")},
            "num_classes": len(model.class_names),
            "pool_size": None,
            "first_conv": "stem.proj",
            "classifier": "head",
        },
    }
    words = dict(zip(model.class_names, in_words(model.class_names), strict=True))
    if any(name != word for name, word in words.items()):
        config["label_descriptions"] = words
    return config


_ACT_LAYERS = {gelu: layer for layer, gelu in GELU_OF.items()}
_CROP_MODES = {fit: mode for mode, fit in FIT_OF.items()}


def _ratio(dim: int, of: int) -> float:
    """Returns a number which, multiplied by `of` and rounded down, is `dim`."""
    return dim / of if int(dim / of * of) == dim else math.nextafter(dim / of, math.inf)


def _per_channel(values: Any, channels: int) -> list[float]:
    return list(values) * (channels if len(values) == 1 else 1)
