"""Decides when the training loop logs, evaluates, saves and stops early."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlpmixer_flax.run_weights import SCORED, Score, score_of


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
    """Remembers the best score of a run; `best_by` says which score, one of `run_weights.BEST_BY`."""

    def __init__(self, score: Score | None = None, *, best_by: str = "accuracy"):
        self.score, self.best_by = score, best_by  # the best so far

    def improves(self, scores: Mapping[str, float] | None) -> bool:
        """Returns whether these scores are the best so far, or as good as the best, and remembers them if so.

        None means that the step was not evaluated: it is never the best.
        """
        score = score_of(scores, self.best_by)
        if score is None or (self.score and score.rank < self.score.rank):
            return False
        self.score = score
        return True


def evals_since_best(rows: Iterable[Mapping[str, float]], *, best_by: str) -> int:
    """Returns how many evaluations came after the first one with the best score of the run.

    An evaluation with an equal score is no better one, and neither is one whose loss is not finite. Evaluations before the
    first with this score do not count: an earlier version of the package did not write it.

    Args:
      rows: of metrics.jsonl.
      best_by: one of `run_weights.BEST_BY`.
    """
    best, since = None, 0
    for row in rows:
        score = score_of(row, best_by)
        if score and (best is None or score.rank > best):
            best, since = score.rank, 0
        elif best is not None and any(f"{scored}/loss" in row for scored in SCORED):
            since += 1
    return since
