"""Tests that the draws of dropout belong to an image, whatever the batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax.models import MixerBlock
from mlpmixer_flax.training.dropout import dropout_by_image

KEYS = jax.random.split(jax.random.key(3), 6)


class TwoDropouts(nn.Module):
    """Two layers whose draws can be told apart, one of which is called twice."""

    rate: float = 0.25

    @nn.compact
    def __call__(self, x):
        first = nn.Dropout(self.rate, deterministic=False)
        whole = nn.Dropout(self.rate, broadcast_dims=(1,), deterministic=False)
        return first(x), first(x), whole(x)


def draws(keys, rate=0.25):
    with dropout_by_image(keys):
        return [
            np.asarray(x)
            for x in TwoDropouts(rate).apply(
                {}, jnp.ones((len(keys), 2000)), rngs={"dropout": jax.random.key(0)}
            )
        ]


def test_draws_are_those_of_the_image_and_differ_between_images_layers_and_calls():
    once, again, whole = draws(KEYS)
    assert not np.array_equal(once, again)
    for drawn in (once, again):
        assert set(drawn.ravel().tolist()) == {0.0, np.float32(1 / 0.75).item()}
        assert len({row.tobytes() for row in drawn}) == 6
        assert abs((drawn == 0).mean() - 0.25) < 0.02  # 12,000 draws: 5 standard deviations
    assert (whole == whole[:, :1]).all()  # one draw per image
    order = np.array([4, 1])
    for part, of_all in zip(draws(KEYS[order]), (once, again, whole), strict=True):
        np.testing.assert_array_equal(part, of_all[order])


def test_no_dropout_needs_no_draws():
    assert all((drawn == 1).all() for drawn in draws(KEYS, rate=0.0))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda block: block, lambda block: nn.remat(block, static_argnums=(2,))])
def test_a_block_with_dropout_and_stochastic_depth_computes_each_image_as_if_it_were_alone(wrap):
    block = wrap(MixerBlock)(
        tokens_mlp_dim=3, channels_mlp_dim=5, dropout_rate=0.5, stochastic_depth_rate=0.5
    )
    x = jax.random.normal(jax.random.key(1), (6, 4, 5))
    params = block.init(jax.random.key(2), x, False)

    def loss(x, keys):
        with dropout_by_image(keys):
            return (block.apply(params, x, True, rngs={"dropout": jax.random.key(0)}) ** 2).sum()

    gradient = jax.grad(loss)(x, KEYS)
    alone = [jax.grad(loss)(x[i : i + 1], KEYS[i : i + 1]) for i in range(6)]
    np.testing.assert_allclose(gradient, np.concatenate(alone), rtol=1e-5, atol=1e-6)
    assert len({row.tobytes() for row in np.asarray(gradient)}) == 6
