"""Few-shot evaluation: ridge regression from the features of a few images per class, as in the paper.

Follows `evaluators/fewshot_lsr.py` of google-research/big_vision, in float64.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlpmixer_flax import UserError

# big_vision reports this strength (`configs/common_fewshot.py`). It is fixed, so test labels do not choose it.
HEADLINE_L2 = 2.0**10
_BIAS = 100.0  # so large that its weight is small and hardly regularized; as in big_vision


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
    """Returns the test accuracy of ridge regression from `shots` images per class, with a new draw per seed.

    Features are pooled features, float (n, hidden_dim); labels are int (n,). Each feature is whitened with
    its mean and deviation over the images drawn. Targets are 1 for the class of an image and -1 for others.

    Returns:
      A dict: `accuracy`, the mean over the seeds at HEADLINE_L2; `accuracy_by_seed`, one value per seed;
      `l2`, HEADLINE_L2; and `accuracy_by_l2`, the means at HEADLINE_L2 and at every strength of the argument
      `l2`, which must be above 0. The best of these is chosen on the test set, so it is optimistic.

    Raises:
      UserError: `shots` is below 1, or a class of either set has fewer training images.
    """
    classes = np.union1d(train_labels, test_labels)
    counts = np.array([np.sum(train_labels == label) for label in classes])
    if not 1 <= shots <= counts.min():
        fewer = f"1 to {counts.min()}, or " if counts.min() else ""
        raise UserError(
            f"shots={shots} is not possible, because class {classes[counts.argmin()]} has {counts.min()} "
            f"training images: choose {fewer}a larger training split"
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
    """Yields, per strength, the weights (d, k) that minimise |x @ weights - y|² + strength · |weights|².

    x is float64 (n, d) and y is (n, k); n may be above or below d. One decomposition serves every strength.
    """
    # Of x itself, because x.T @ x would square its condition number, which the bias makes large.
    left, scale, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ y
    for strength in l2:
        yield right.T @ ((scale / (scale**2 + strength))[:, None] * projected)


def _whiten(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as float64, whitened by the mean and deviation of `train`, with the bias as last column."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-5  # a constant feature becomes 0
    whitened, test_whitened = (
        np.pad((features - mean) / deviation, ((0, 0), (0, 1)), constant_values=_BIAS)
        for features in (train, test)
    )
    return whitened, test_whitened
