"""Distillation: a run learns the predictions of a trained model, its teacher, instead of the labels.

Both see the same augmented images in every update (function matching, arXiv 2106.05237), and the loss is the divergence of
the model's softened predictions from those of the teacher (arXiv 1503.02531). Labels are for the accuracy and for `class_weights` only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.limits import show
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.losses import Loss
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.weights.module import module_of, shapes_of
from mlpmixer_flax.weights.origin import comparable
from mlpmixer_flax.weights.source import Weights, find, load_found


@dataclass(frozen=True)
class Teacher:
    """A trained model whose predictions a run learns."""

    module: MlpMixer
    params: Params  # a tree of float32 numpy arrays

    @cached_property
    def digest(self) -> str:
        """A hash of all parameters."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in sorted(flatten_dict(self.params, sep="/").items()):
            digest.update(f"{name} {array.shape}".encode())
            digest.update(array)
        return digest.hexdigest()

    def place(self, mesh: Mesh) -> Params:
        """Returns the parameters on the devices, divided over them like those that learn."""
        return sharding.put_parts(self.params, sharding.state_placements(self.params, mesh))


def load_teacher(
    config: ConfigDict, *, class_names: Sequence[str], image_shape: tuple[int, int, int]
) -> Teacher | None:
    """Returns the model of config.distill_from; None if it is "".

    Args:
      class_names: of the data, in the order of the labels.
      image_shape: (height, width, channels) of the images that the run gives to its model.

    Raises:
      UserError: the weights cannot be loaded (see `source.load`), or are for other classes or images.
    """
    source = config.distill_from
    if not source:
        return None
    weights = find(source)
    module, their_shape = module_of(weights, source)
    _check_classes(weights, source, num_classes=module.num_classes, class_names=class_names)
    if their_shape[2] != image_shape[2]:
        raise UserError(
            f"distill_from={source!r} is a model for images of {their_shape[2]} channels, but those of {config.dataset!r} "
            f"have {image_shape[2]}: choose another teacher"
        )
    _check_keys(config, weights, image_size_px=their_shape[0])
    return Teacher(module, load_found(weights, shapes_of(module, their_shape), name=source, head="keep"))


def _check_classes(weights: Weights, source: str, *, num_classes: int, class_names: Sequence[str]) -> None:
    theirs = weights.metadata.get("class_names") or class_names
    if num_classes != len(class_names):
        different = f"{num_classes:,} classes, but the data has {len(class_names):,}"
    elif len(theirs) != num_classes:
        different = f"{len(theirs):,} class names for {num_classes:,} classes"
    elif pairs := [pair for pair in zip(theirs, class_names, strict=True) if pair[0] != pair[1]]:
        different = f"the class {show(pairs[0][0])} where the data has {show(pairs[0][1])}"
    else:
        return
    raise UserError(f"distill_from={source!r} has {different}: choose a teacher with the same classes")


def _check_keys(config: ConfigDict, weights: Weights, *, image_size_px: int) -> None:
    """Checks that the teacher can use the run's images, and that its logits mean the same.

    Raises:
      UserError: a key of the config differs from the teacher's.
    """
    stated = weights.metadata["preprocess"]
    pairs = {
        "preprocess.image_size_px": (image_size_px, config.preprocess.image_size_px),
        "preprocess.mean": (comparable(stated["mean"]), comparable(config.preprocess.mean)),
        "preprocess.std": (comparable(stated["std"]), comparable(config.preprocess.std)),
        "loss": (weights.metadata.get("loss", "softmax"), config.loss),
    }
    for key, (theirs, ours) in pairs.items():
        if theirs != ours:
            value = ",".join(map(str, theirs)) if isinstance(theirs, tuple) else theirs
            raise UserError(
                f"distill_from={config.distill_from!r} was trained with {key}={show(theirs)}, but this run has {show(ours)}, "
                f"and a teacher sees the same images: set --config.{key}={value}, or choose another teacher"
            )


def divergence(logits: jax.Array, taught: jax.Array, *, loss: Loss, temperature: float) -> jax.Array:
    """Returns the Kullback-Leibler divergence of predictions from those of a teacher, float32 (n,).

    Logits are divided by the temperature, which makes gradients smaller by its square; a factor makes up for it.

    Args:
      logits, taught: of the model and of the teacher, (n, classes).
      loss: says how logits become probabilities: of one distribution, or of one for each class.
    """
    logits, taught = logits / temperature, taught / temperature
    targets = loss.probabilities(taught)
    return temperature**2 * (loss.per_image(logits, targets) - loss.per_image(taught, targets))
