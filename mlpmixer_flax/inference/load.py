"""Loads trained models by name: published weights, files, URLs, the Hugging Face hub, run directories."""

import contextlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.data.images import FITS, RESAMPLING
from mlpmixer_flax.inference.classes import imagenet_names, numbers
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.limits import check_limits, show
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.remote import copy_of, shown
from mlpmixer_flax.run_weights import open_run
from mlpmixer_flax.rundir import fetch_run, is_multi_label, read_config_of_run
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.validate import complete
from mlpmixer_flax.weights import source as weight_source
from mlpmixer_flax.weights.module import check_shapes, module_of, shapes_of


def load(source: str | Path, *, checkpoint: str | int | None = None) -> Model:
    """Returns a trained model, ready to use.

        model = load("imagenet21k/Mixer-B_16")
        model.predict(["cat.jpg"])

    Args:
      source: a published name (`python -m mlpmixer_flax.pretrained` lists them), an npz or safetensors file,
        the URL of one, "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", a folder with the files of such
        a model, or a run directory. "runs/b16@best" is the same as "runs/b16" with checkpoint="best".
      checkpoint: for a run directory: "best", "last", "ema" or the number of a saved step. None: "best" if the
        run was evaluated, else "ema" if it keeps an EMA, else "last".

    Raises:
      UserError: the weights cannot be found, downloaded or read, or have no head.
    """
    wanted = None if checkpoint is None else str(checkpoint)
    run = weight_source.named_run(source)
    if run and wanted and run.checkpoint not in (None, wanted):
        raise UserError(
            f"{source} and checkpoint={checkpoint!r} name different weights: leave one of them out"
        )
    if run:
        return load_run(run.workdir, wanted or run.checkpoint)
    if wanted:
        raise UserError(f"checkpoint={checkpoint!r} is for run directories only: leave it out for {source}")
    return _load_weights(str(source))


def load_run(workdir: str | Path, checkpoint: str | None = None) -> Model:
    """Returns the model of a run directory; arguments and errors are those of `load`."""
    workdir = fetch_run(copy_of(workdir) or Path(os.path.expanduser(workdir)))
    config = complete(read_config_of_run(workdir), name=f"{shown(workdir)}/config.json")
    run = open_run(workdir, checkpoint, check=partial(check_shapes, name=shown(workdir)))
    module = MlpMixer(num_classes=len(run.class_names), **config["model"])
    return Model(
        name=shown(workdir),
        module=module,
        params=run.params,
        preprocess=config["preprocess"],
        class_names=tuple(run.class_names),
        loss=config["loss"],
        multi_label=is_multi_label(workdir),
        config=config,
        step=run.step,
        scores=run.scores,
        resolutions_px=tuple(config["resolutions_px"]),
    )


def _load_weights(source: str) -> Model:
    weights = weight_source.find(source)
    module, image_shape = module_of(weights, source)
    origin = weights.metadata
    loss, class_names = origin.get("loss", "softmax"), origin.get("class_names", ())
    if loss not in LOSSES or len(class_names) not in (0, module.num_classes):
        raise UserError(
            f"the metadata of {source} contradicts itself (loss {loss!r}, {len(class_names)} names for "
            f"{module.num_classes} classes): write the file again"
        )
    if not class_names:  # a file of ours that has no room for the names says how many there are
        class_names = numbers(module.num_classes)
        if "num_classes" not in origin:
            class_names = _imagenet_names(source, module.num_classes)
    like = shapes_of(module, image_shape)
    return Model(
        name=source,
        module=module,
        params=weight_source.load_found(weights, like, name=source, head="keep"),
        preprocess=_preprocess(source, origin["preprocess"], image_shape),
        class_names=tuple(class_names),
        loss=loss,
        config={},
        resolutions_px=tuple(origin.get("resolutions_px", ())),
    )


def _imagenet_names(source: str, num_classes: int) -> list[str]:
    """Returns ImageNet's class names if their number fits; says so if the weights are not known to be ImageNet's."""
    names = imagenet_names(num_classes)
    if names != numbers(num_classes) and not weight_source.published_as(source):
        print(
            f"{source}: the weights have no class names; those of ImageNet are used, because there are {num_classes:,} classes"
        )
    return names


def _preprocess(source: str, stated: Mapping[str, Any], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns `config.preprocess` as weights state it, checked; keys that they do not state have usual values."""
    usual = resolve(get_config(), {}).preprocess.to_dict()
    usual |= {"image_size_px": image_shape[0], "crop_fraction": 0.875}
    unknown = sorted(stated.keys() - usual)
    if unknown:  # from a later version of this package
        print(
            f"{source}: not known to this version, and not used: {', '.join(f'{key:.40}' for key in unknown[:5])}"
        )
    preprocess = {key: stated.get(key, value) for key, value in usual.items()}
    checks = {
        "interpolation": preprocess["interpolation"] in tuple(RESAMPLING),
        "fit": preprocess["fit"] in FITS,
        "crop_fraction": _are_numbers([preprocess["crop_fraction"]]),
        **{
            key: _are_numbers(preprocess[key]) and len(preprocess[key]) in (1, image_shape[2])
            for key in ("mean", "std")
        },
    }
    for key, value in preprocess.items():
        usable = checks.get(key, True)
        with contextlib.suppress(UserError):
            if usable:
                check_limits(f"preprocess.{key}", value)
                continue
        raise UserError(
            f"the metadata of {source} has preprocess.{key}={show(value)}, which cannot be used: write the file again"
        )
    return preprocess


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
    )
