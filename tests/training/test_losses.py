"""Compares the losses and their probabilities with NumPy."""

import jax
import numpy as np
import pytest
from tiny_updates import log_softmax, loss_by_hand

from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.validate import CHOICES

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.mark.parametrize("name", CHOICES["loss"])
def test_loss_equals_its_formula_with_soft_labels(name):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (6, 5)), rng.dirichlet(np.ones(5), 6)
    loss = jax.jit(LOSSES[name].per_image)(np.float32(logits), np.float32(labels))
    np.testing.assert_allclose(loss, loss_by_hand(name, logits, labels), rtol=1e-5)


@pytest.mark.parametrize("name", CHOICES["loss"])
def test_loss_is_finite_and_exact_for_confident_wrong_logits(name):
    logits, labels = np.float32([[200.0, -200.0]]), np.float32([[0.0, 1.0]])
    np.testing.assert_allclose(
        jax.jit(LOSSES[name].per_image)(logits, labels), {"softmax": [400.0], "sigmoid": [400.0]}[name]
    )


@pytest.mark.parametrize("name", CHOICES["loss"])
def test_probabilities_equal_their_formula(name):
    logits = np.random.default_rng(0).normal(0, 3, (6, 5))
    expected = {"softmax": np.exp(log_softmax(logits)), "sigmoid": 1 / (1 + np.exp(-logits))}[name]
    np.testing.assert_allclose(LOSSES[name].probabilities(np.float32(logits)), expected, rtol=1e-5)
