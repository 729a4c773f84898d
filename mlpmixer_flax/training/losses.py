"""The two losses, and the probabilities that go with each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Loss(NamedTuple):
    """A loss and the probabilities of the classes that a model trained with it predicts."""

    per_image: Callable[
        [jax.Array, jax.Array], jax.Array
    ]  # (n, classes) logits and label distributions -> (n,)
    probabilities: Callable[[jax.Array], jax.Array]  # (n, classes) logits -> (n, classes)


def _softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(logits, labels)


def _sigmoid_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels), axis=-1)


# The values of config.loss
LOSSES = {"softmax": Loss(_softmax_loss, jax.nn.softmax), "sigmoid": Loss(_sigmoid_loss, jax.nn.sigmoid)}
