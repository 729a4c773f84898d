"""Weights of the classes in the training loss, so that rare classes count as much as others.

An image's loss is multiplied by the weight of its class; a mix of two images has the mean of their weights, in the
proportion of the mix. Weights are scaled so that their average over the training images is 1. So the loss, and with it the
best learning rate and clip_norm, keep their size, and the mean over a batch stays a plain mean: any number of devices,
microbatches or chunks gives the same one.
"""

import re
from collections.abc import Sequence
from typing import cast

import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.dataloader import Examples
from mlpmixer_flax.limits import show
from mlpmixer_flax.text import listed, quoted, shorten, wrap

_LARGEST = 1e6
# A name may have commas and equals signs, so an item ends at a comma only if a number is before it.
_ITEM = re.compile(r"(.+?)=\s*([-+.\w]+)\s*(?:,|$)", re.DOTALL)


def parse_weights(text: str) -> dict[str, float]:
    """Returns class -> weight, as config.class_weights has them: "cat=2, dog=0.5"; {} for "" and "balanced".

    Raises:
      UserError: the text cannot be read, or a weight is below 0 or above a million.
    """
    weights: dict[str, float] = {}
    position = 0
    while position < len(text) and text != "balanced":
        item = _ITEM.match(text, position)
        try:
            name, weight = (item[1].strip(), float(item[2])) if item else ("", np.nan)
        except ValueError:
            name, weight = "", np.nan
        if item is None or not name or not 0 <= weight <= _LARGEST:
            raise UserError(
                f"class_weights={show(text)} has no weight from 0 to {_LARGEST:,.0f} after {show(text[:position])}: "
                "give 'balanced', or the weights of classes, such as 'cat=2,dog=0.5'"
            )
        if name in weights:
            raise UserError(f"class_weights={show(text)} has {show(name)} twice: give it once")
        weights[name], position = weight, item.end()
    return weights


def weights_of(text: str, class_names: Sequence[str], examples: Examples) -> np.ndarray | None:
    """Returns the weight of each class, float32 (classes,); None if config.class_weights is "".

    "balanced" gives each class that has images the same sum of weights. If a streamed TFDS split does not tell its
    labels, all its records are read once.

    Args:
      text: config.class_weights.
      class_names: in the order of the labels.
      examples: of the training split.

    Raises:
      UserError: the text names an unknown class, or leaves no image a weight above 0; or a record is damaged.
    """
    if not text:
        return None
    given = parse_weights(text)
    if unknown := [name for name in given if name not in class_names]:
        raise UserError(
            f"class_weights={show(text)} has {show(unknown[0])}, which is not a class: use names such as "
            f"{quoted(class_names, 5)}"
        )
    counts = np.bincount(_labels(examples), minlength=len(class_names))
    if text == "balanced":
        weights = np.divide(1.0, counts, out=np.zeros(len(counts)), where=counts > 0)
    else:
        weights = np.array([given.get(name, 1.0) for name in class_names])
    average = counts @ weights / counts.sum()
    if not average:
        raise UserError(f"class_weights={show(text)} gives all training images the weight 0: give others")
    return (weights / average).astype(np.float32)


def _labels(examples: Examples) -> np.ndarray:
    if (labels := examples.known_labels) is not None:
        return labels
    labels = np.empty(len(examples), np.int64)
    chunks = np.array_split(np.arange(len(examples)), -(-len(examples) // 256))
    for chunk in tqdm(chunks, "counting labels", delay=2, leave=False, disable=None):
        for index, record in zip(chunk, examples.source.records.__getitems__(chunk.tolist()), strict=True):
            label = cast(int, record.label)
            if record.flaw or not 0 <= label < examples.num_classes:
                flaw = record.flaw or f"its label {label} is not in [0, {examples.num_classes})"
                raise UserError(
                    f"image {record.name} of {examples.name} cannot be used ({flaw}): {examples.source.remedy}"
                )
            labels[index] = label
    return labels


def unsmoothed(weights: np.ndarray, *, smoothing: float) -> np.ndarray:
    """Returns float32 (classes,) whose product with a smoothed label distribution is the weight of the image.

    Smoothing moves a share of each label to all classes, and would give every image some of the weight of rare ones.
    """
    mean = weights.mean(dtype=np.float64)
    return ((weights - smoothing * mean) / (1 - smoothing)).astype(np.float32)


def describe_class_weights(weights: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns up to eight lines with the largest weights, to print at the start of a run."""
    order = np.argsort(-weights, kind="stable").tolist()
    each = [f"{shorten(class_names[int(number)], 24)}: {weights[number]:.4g}" for number in order]
    return wrap(f"class weights in the training loss: {listed(each)}")
