"""Few-shot evaluation: compared with scikit-learn's ridge regression, and on features whose accuracy is known."""

import json

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.fewshot import HEADLINE_L2, few_shot, ridge


def clusters(images_per_class, *, num_classes=4, dim=12, spread=0.1, seed=0):
    """Returns features around one random centre per class, and labels; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(num_classes, dim))
    labels = np.repeat(np.arange(num_classes), images_per_class)
    noise = np.random.default_rng(seed).normal(size=(len(labels), dim))
    return (centres[labels] + spread * noise).astype(np.float32), labels


@pytest.mark.parametrize(("n", "d"), [(40, 7), (7, 40), (20, 20)])
def test_weights_equal_those_of_scikit_learn_at_every_strength(n, d):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 3))
    x[:, -1] = 100  # as the bias
    strengths = [2.0**-10, 1.0, 2.0**10, 2.0**20]
    for strength, weights in zip(strengths, ridge(x, y, l2=strengths), strict=True):
        expected = Ridge(alpha=strength, fit_intercept=False, solver="cholesky").fit(x, y).coef_.T
        np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-9)


def test_weights_are_finite_if_features_repeat_or_are_constant():
    column = np.random.default_rng(0).normal(size=(30, 1))
    x = np.hstack([column, column, np.zeros((30, 1)), np.full((30, 1), 100.0)])
    (weights,) = ridge(x, np.sign(column), l2=[2.0**-10])
    assert weights[0] == pytest.approx(weights[1]) and 0 < weights[0] < 1
    assert abs(weights[2:]).max() < 1e-3


@pytest.mark.parametrize("dim", [6, 60])  # fewer and more than the 4 · 5 images drawn
def test_accuracy_equals_that_of_scikit_learn_on_the_same_images(dim):
    # The training set has only `shots` images per class, so every seed draws all of them.
    train, train_labels = clusters(5, dim=dim, spread=2)
    test, test_labels = clusters(50, dim=dim, spread=2, seed=1)
    result = few_shot(train, train_labels, test, test_labels, seeds=(0, 1), l2=(1.0, 2.0**14))
    scaler = StandardScaler().fit(train.astype(np.float64))
    train, test = (
        np.hstack([scaler.transform(x.astype(np.float64)), np.full((len(x), 1), 100)]) for x in (train, test)
    )
    targets = 2 * np.eye(4)[train_labels] - 1
    assert list(result["accuracy_by_l2"]) == [1.0, HEADLINE_L2, 2.0**14]
    for strength, accuracy in result["accuracy_by_l2"].items():
        naive = Ridge(alpha=strength, fit_intercept=False).fit(train, targets)
        expected = np.mean(naive.predict(test).argmax(axis=1) == test_labels)
        assert 0.3 < expected < 1 and accuracy == pytest.approx(expected, abs=1e-12)


def test_separable_features_score_one_and_random_features_score_chance():
    train, train_labels = clusters(20)
    test, test_labels = clusters(500, seed=1)
    assert few_shot(train, train_labels, test, test_labels)["accuracy"] == 1
    assert few_shot(train, train_labels, test, test_labels, shots=1)["accuracy"] == 1
    noise = np.random.default_rng(2)
    train, test = noise.normal(size=train.shape), noise.normal(size=test.shape)
    # With 4 classes and 2,000 images, the standard deviation is 0.01.
    assert few_shot(train, train_labels, test, test_labels)["accuracy"] == pytest.approx(0.25, abs=0.05)


def test_each_seed_draws_other_images_and_the_same_ones_again():
    train, train_labels = clusters(30, spread=2)
    test, test_labels = clusters(200, spread=2, seed=1)
    result = few_shot(train, train_labels, test, test_labels)
    assert result == few_shot(train, train_labels, test, test_labels)
    assert len(set(result["accuracy_by_seed"])) == 3
    assert result["accuracy"] == pytest.approx(np.mean(result["accuracy_by_seed"]))
    assert result["accuracy"] == pytest.approx(result["accuracy_by_l2"][result["l2"]])
    alone = few_shot(train, train_labels, test, test_labels, seeds=(2,))
    assert alone["accuracy"] == result["accuracy_by_seed"][2]
    more = few_shot(train, train_labels, test, test_labels, shots=30)
    assert more["accuracy"] > result["accuracy"] + 0.05
    json.dumps(result, allow_nan=False)


def test_scale_shift_and_constant_features_and_numbers_of_classes_change_nothing():
    train, train_labels = clusters(30, spread=2)
    test, test_labels = clusters(200, spread=2, seed=1)
    plain = few_shot(train, train_labels, test, test_labels)
    scale = np.geomspace(1, 1e4, train.shape[1])
    moved, moved_test = (np.pad(x * scale + 7, ((0, 0), (0, 2)), constant_values=3) for x in (train, test))
    moved = few_shot(moved, train_labels, moved_test, test_labels)
    assert moved["accuracy_by_seed"] == pytest.approx(plain["accuracy_by_seed"], abs=2e-3)
    assert plain == few_shot(train, train_labels * 10 + 3, test, test_labels * 10 + 3)


def test_images_that_are_not_drawn_do_not_matter_even_for_whitening():
    train, train_labels = clusters(30, spread=2)
    test, test_labels = clusters(200, spread=2, seed=1)
    plain = few_shot(train, train_labels, test, test_labels, shots=1)
    changed = 0
    for i in range(30):  # three seeds draw at most three of these
        poisoned = train.copy()
        poisoned[i] *= 1e9
        changed += few_shot(poisoned, train_labels, test, test_labels, shots=1) != plain
    assert 1 <= changed <= 3


@pytest.mark.parametrize(
    ("shots", "missing", "message"),
    [
        (6, [], "shots=6 is not possible, because class 0 has 5"),
        (5, [7], "shots=5 is not possible, because class 1 has 4"),
        (
            1,
            range(15, 20),
            "shots=1 is not possible, because class 3 has 0 training images: choose a larger training split",
        ),
        (
            0,
            [],
            "shots=0 is not possible, because class 0 has 5 .* choose 1 to 5",
        ),
    ],
)
def test_an_error_names_a_class_with_too_few_images(shots, missing, message):
    train, labels = clusters(5)
    kept = np.setdiff1d(np.arange(20), missing)
    with pytest.raises(UserError, match=message):
        few_shot(train[kept], labels[kept], *clusters(3, seed=1), shots=shots)
