"""How good frozen features are: ridge regression from a few images a class, the paper's 5-shot evaluation.

Follows `evaluators/fewshot_lsr.py` of google-research/big_vision, in float64.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlpmixer_flax import UserError

# big_vision's strength (`configs/common_fewshot.py`). Fixed, so that no label of the test set chooses it.
HEADLINE_L2 = 2.0**10
_BIAS = 100.0  # so large that its weight, small in turn, is hardly regularized; big_vision's too


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    l2: Sequence[float] = tuple(2.0**power for power in range(-10, 21, 2)),
) -> dict[str, Any]:
    """Test accuracy of ridge regression from `shots` images a class, drawn anew for each seed.

    Takes pre-logits, float (n, hidden_dim), and labels, int (n,). Features are whitened, each by its mean and
    deviation over the images drawn; the targets are 1 for an image's class and -1 for the others.

    Returns:
      A dict: `accuracy`, the mean over the seeds at HEADLINE_L2; `accuracy_by_seed`, its parts;
      `l2`, HEADLINE_L2; and `accuracy_by_l2`, the means at HEADLINE_L2 and at every strength of the argument
      `l2`, which must be above 0. The best of those is chosen on the test set, so it is optimistic.

    Raises:
      UserError: `shots` is below 1, or a class of either set has fewer training images.
    """
    classes = np.union1d(train_labels, test_labels)
    counts = np.array([np.sum(train_labels == label) for label in classes])
    if not 1 <= shots <= counts.min():
        raise UserError(
            f"shots={shots} cannot be drawn from class {classes[counts.argmin()]}, which has {counts.min()} "
            "training images: choose from 1 to as many as there are, or a larger split"
        )
    strengths = sorted({*l2, HEADLINE_L2})
    accuracies = np.empty((len(strengths), len(seeds)))
    for column, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(np.flatnonzero(train_labels == label), shots, replace=False) for label in classes]
        images = np.concatenate(drawn)
        x, test_x = _whiten(train_features[images], test_features)
        y = np.where(train_labels[images, None] == classes, 1.0, -1.0)
        for row, weights in enumerate(ridge(x, y, l2=strengths)):
            predicted = classes[np.argmax(test_x @ weights, axis=1)]
            accuracies[row, column] = np.mean(predicted == test_labels)
    headline = accuracies[strengths.index(HEADLINE_L2)]
    return {
        "accuracy": float(headline.mean()),
        "accuracy_by_seed": headline.tolist(),
        "l2": HEADLINE_L2,
        "accuracy_by_l2": dict(zip(strengths, accuracies.mean(axis=1).tolist(), strict=True)),
    }


def ridge(x: np.ndarray, y: np.ndarray, *, l2: Sequence[float]) -> Iterator[np.ndarray]:
    """For each strength the weights (d, k) least in |x @ weights - y|² + strength · |weights|².

    Takes float64 x (n, d) and y (n, k), n above or below d; one decomposition serves every strength.
    """
    # Of x itself: x.T @ x would square its condition, which the bias has made large.
    left, scale, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ y
    for strength in l2:
        yield right.T @ ((scale / (scale**2 + strength))[:, None] * projected)


def _whiten(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both by the mean and deviation of `train`, in float64, with the bias as a last column."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-5  # a constant feature becomes 0
    return tuple(
        np.pad((features - mean) / deviation, ((0, 0), (0, 1)), constant_values=_BIAS)
        for features in (train, test)
    )
