"""Parameters of tiny and of published Mixers, and how they are adapted or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError, config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.adapt import adapt

TINY = {
    "patches": {"size": (2, 2)},
    "hidden_dim": 8,
    "num_blocks": 2,
    "tokens_mlp_dim": 6,
    "channels_mlp_dim": 12,
}


def mixer(num_classes=3, **changes):
    return MlpMixer(num_classes=num_classes, **{**TINY, **changes})


def tree_of(model, image_shape):
    """Returns the model's parameters as shapes."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]


def random_params(model, image_shape, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), tree_of(model, image_shape)
    )


def shapes_of(params):
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}


def adapt_params(params, like, **options):
    flat = flatten_dict(params, sep="/")
    return adapt({name: leaf.shape for name, leaf in flat.items()}, flat.__getitem__, like, **options)


def complaint(shapes, like, **options):
    """Returns the message of the error, which must come before anything is read."""

    def read(name):
        pytest.fail(f"{name} was read although the weights don't fit")

    with pytest.raises(UserError) as error:
        adapt(shapes, read, like, **options)
    return str(error.value)


def published(name, size_px, num_classes=1000, **changes):
    fields = {**getattr(config, f"mixer_{name}_config").to_dict(), **changes}
    return tree_of(MlpMixer(num_classes=num_classes, **fields), (size_px, size_px, 3))
