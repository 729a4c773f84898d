"""Writes the text of a model card: what a model is, how to use it, how good it is and how it was trained."""

from collections.abc import Mapping
from typing import Any

from mlpmixer_flax import __version__
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.run_weights import SCORED, split_size
from mlpmixer_flax.text import listed, printable

_MAX_CLASSES = 100  # named in the card; config.json has all
_HEAD = """\
---
# license: apache-2.0  # remove the first "#", and put the licence that you choose here
{library}pipeline_tag: image-classification
tags:
- image-classification
- mlp-mixer
---
"""
_PERCENT = {
    "accuracy": "accuracy",
    "accuracy_top5": "top-5 accuracy",
    "balanced_accuracy": "balanced accuracy",
    "mean_average_precision": "mean average precision",
}
_KINDS = {"folder": "a folder of images", "table": "a table of labels"}  # kinds of datasets that have a path
_FITS = {"crop": "the central square is cut out", "pad": "padded with gray", "stretch": "stretched"}


def model_card(model: Model, config: Mapping[str, Any], *, name: str) -> str:
    """Returns the card in Markdown, for the README.md beside the weights.

    It has no path of this machine: of a folder or a table it has only the name.

    Args:
      config: the content of config.json, as `hub_folder.timm_config` returns it.
      name: OWNER/NAME on the hub, or the name of the folder.
    """
    by_name = config["architecture"].startswith("mixer_")
    sections = {
        "Use": _use(model, by_name=by_name, name=name),
        "Figures": _figures(model),
        "Data": _data(model),
        "Preprocessing": _preprocessing(model),
        "Training": _training(model),
        "Licence": "To be filled in by the author, here and in the first lines of this file. Consider the licences of "
        "the images and of weights that the training began with.",
    }
    parts = [
        _HEAD.format(library="library_name: timm\n" if by_name else ""),
        f"# {_text(name)}\n",
        f"An MLP-Mixer ([arXiv 2105.01601](https://arxiv.org/abs/2105.01601)) that classifies images, written by "
        f"mlpmixer-flax {__version__}.\n",
        *(f"## {title}\n\n{text}\n" for title, text in sections.items()),
    ]
    return "\n".join(parts)


def _use(model: Model, *, by_name: bool, name: str) -> str:
    on_hub = "/" in name
    tanh = ", act_layer=timm.layers.GELUTanh" if model.module.gelu == "tanh" else ""
    if by_name:
        source = f"hf-hub:{name}" if on_hub else f"local-dir:{name}"
        theirs = [
            "import timm\n",
            f"model = timm.create_model({source!r}, pretrained=True{tanh}).eval()",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            'class_names = model.pretrained_cfg["label_names"]',
        ]
    else:
        theirs = [
            "import json\n",
            *(["import huggingface_hub"] if on_hub else []),
            "import timm\n",
            f"folder = huggingface_hub.snapshot_download({name!r})" if on_hub else f"folder = {name!r}",
            'config = json.load(open(f"{folder}/config.json", encoding="utf-8"))',
            "model = timm.models.mlp_mixer.MlpMixer(",
            f'    num_classes=config["num_classes"], **config["model_args"]{tanh}',
            ").eval()",
            'timm.models.load_checkpoint(model, f"{folder}/model.safetensors")',
            'class_names = config["label_names"]',
        ]
    ours = [
        "import mlpmixer_flax as mf\n",
        f"model = mf.load({(f'hf-hub:{name}' if on_hub else name)!r})",
        'print(model.predict("photo.jpg")[0].top)',
    ]
    paragraphs = ["With timm, in PyTorch:", _code(theirs)]
    if tanh:
        paragraphs.append(
            "The weights were trained with tanh GELU. Without `act_layer`, timm computes erf GELU, which changes "
            "predictions a little."
        )
    if model.loss == "sigmoid":
        paragraphs.append("The outputs are logits; sigmoid makes probabilities of them.")
    return "\n\n".join([*paragraphs, "With mlpmixer-flax, in JAX:", _code(ours)])


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _figures(model: Model) -> str:
    rows, names = [], _PERCENT | ({"accuracy": "all labels right"} if model.multi_label else {})
    for key, value in sorted(model.scores.items(), key=lambda score: split_size(score[0])):
        scored, _, score = key.partition("/")
        score, size_px = split_size(score)
        if scored in SCORED and isinstance(value, (int, float)):
            shown = f"{value:.2%}".replace("%", " %") if score in _PERCENT else f"{value:.4g}"
            size = f" at {size_px} px" if size_px else ""
            rows.append(f"| {scored} | {names.get(score, score)}{size} | {shown} |")
    if not rows:
        return "None were stored with the weights: add those that you measured, on which images and how many."
    split = model.config.get("test_split", "")
    return "\n".join(
        [
            "| images | score | value |\n|---|---|---|",
            *rows,
            f"\nMeasured in training, after {model.step:,} updates, on split `{_text(split)}`; n = 1. If these "
            "weights were chosen because of these scores, other images may score a little lower.",
        ]
    )


def _data(model: Model) -> str:
    names = listed([f"`{_text(name)}`" for name in model.class_names], _MAX_CLASSES)
    classes = f"{len(model.class_names):,} classes: {names}."
    if not model.config:
        return f"Unknown: add on which images the model was trained.\n\n{classes}"
    config = model.config
    dataset = config["dataset"]
    if kind := _KINDS.get(dataset.partition(":")[0]):  # only its name: the path may be private
        dataset = f"{kind}, {dataset.rstrip('/').replace(':', '/').rpartition('/')[2]}"
    return (
        f"Trained on `{_text(dataset)}`, split `{_text(config['train_split'])}`; evaluated on split "
        f"`{_text(config['test_split'])}`.\n\n{classes}"
    )


def _preprocessing(model: Model) -> str:
    preprocess, channels = model.preprocess, {1: "gray", 3: "RGB", 4: "RGBA"}[model.channels]
    size_px, mean, std = (preprocess[key] for key in ("image_size_px", "mean", "std"))
    share = preprocess["crop_fraction"]
    crop = f"the central crop keeps {share:.4g} of each side; " if share < 1 else ""
    return (
        f"{channels} images of {size_px}x{size_px} px. Images that are not square: {_FITS[preprocess['fit']]}; "
        f"{crop}resized with {preprocess['interpolation']} interpolation. Pixels in [0, 1], minus mean {_values(mean)}, divided by std "
        f"{_values(std)}."
    )


def _training(model: Model) -> str:
    module = model.module
    sizes = (
        f"Patches of {'x'.join(map(str, module.patches['size']))} px, {module.num_blocks} blocks, hidden_dim "
        f"{module.hidden_dim}, tokens_mlp_dim {module.tokens_mlp_dim}, channels_mlp_dim {module.channels_mlp_dim}, "
        f"{module.gelu} GELU."
    )
    if not model.config:
        return sizes
    config = model.config
    start = (
        "the weights " + config["init_from"].rpartition("/")[2] if config["init_from"] else "random weights"
    )
    if config["distill_from"]:
        start += ", and learned the predictions of " + config["distill_from"].rpartition("/")[2]
    optimizer, resolutions = config["optimizer"], sorted(config["resolutions_px"])
    images = (
        f", each with images of one of {len(resolutions)} sizes ({listed([*map(str, resolutions)], 16)} px)"
    )
    return (
        f"{sizes} Started from {_text(start)}; {model.step:,} updates of {config['batch_size']:,} images"
        f"{images * bool(resolutions)}, with "
        f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {model.loss} loss, seed {config['seed']}."
    )


def _values(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _text(text: str) -> str:
    """Returns a name on one line, without the characters that end code or begin HTML in Markdown."""
    return printable(text).replace("`", "'").replace("<", "‹")
