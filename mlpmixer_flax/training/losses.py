"""Defines the losses of a run, the probabilities that belong to each, and when several labels are all right."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Loss(NamedTuple):
    """A loss, and how logits become probabilities in a model that was trained with it."""

    # (logits, label distributions), both (n, classes) -> (n,)
    per_image: Callable[[jax.Array, jax.Array], jax.Array]
    # logits (n, classes) -> (n, classes)
    probabilities: Callable[[jax.Array], jax.Array]


def _softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits, labels)


def _sigmoid_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)


# The values of config.loss
LOSSES = {"softmax": Loss(_softmax_loss, jax.nn.softmax), "sigmoid": Loss(_sigmoid_loss, jax.nn.sigmoid)}


def all_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns, per image, whether exactly its labels have a probability above 0.5: (n, classes) each -> bool (n,)."""
    return jnp.all((logits > 0) == (labels > 0), axis=-1)
