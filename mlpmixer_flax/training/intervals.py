"""Decides when the training loop logs, evaluates and saves."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlpmixer_flax.run_weights import accuracy_of


@dataclass(frozen=True)
class Intervals:
    """Intervals in steps; 0 = only at the end of the run. At the end, everything is due."""

    total_steps: int
    log_every: int
    evaluate_every: int
    save_every: int

    def log(self, step: int) -> bool:
        """Returns whether to log after this step."""
        return self._due(self.log_every, step)

    def evaluate(self, step: int) -> bool:
        """Returns whether to evaluate after this step."""
        return self._due(self.evaluate_every, step)

    def save(self, step: int) -> bool:
        """Returns whether to save a checkpoint after this step."""
        return self._due(self.save_every, step)

    def _due(self, every: int, step: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)


class Best:
    """Remembers the best accuracy of a run."""

    def __init__(self, accuracy: float = 0.0):
        self.accuracy = accuracy  # the best so far

    def improves(self, scores: Mapping[str, float] | None) -> bool:
        """Returns whether these scores are the best so far, or as good as the best, and remembers them if so.

        None means that the step was not evaluated: it is never the best.
        """
        accuracy = accuracy_of(scores)
        if accuracy is None or accuracy.value < self.accuracy:
            return False
        self.accuracy = accuracy.value
        return True
