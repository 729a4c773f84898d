"""Tests when the loop logs, evaluates, saves and stops early, and which scores are the best."""

from mlpmixer_flax.run_weights import Score
from mlpmixer_flax.training.intervals import Best, Intervals, evals_since_best


def due_steps(check, total_steps):
    return [step for step in range(1, total_steps + 1) if check(step)]


def test_each_interval_counts_by_itself_and_the_end_counts_for_all():
    intervals = Intervals(total_steps=11, log_every=4, evaluate_every=5, save_every=3)
    assert due_steps(intervals.log, 11) == [4, 8, 11]
    assert due_steps(intervals.evaluate, 11) == [5, 10, 11]
    assert due_steps(intervals.save, 11) == [3, 6, 9, 11]


def test_an_interval_of_0_is_due_only_at_the_end():
    intervals = Intervals(total_steps=6, log_every=0, evaluate_every=0, save_every=2)
    assert due_steps(intervals.log, 6) == [6]
    assert due_steps(intervals.evaluate, 6) == [6]
    assert due_steps(intervals.save, 6) == [2, 4, 6]


def test_the_last_step_is_due_once_if_it_is_also_a_multiple():
    intervals = Intervals(total_steps=4, log_every=2, evaluate_every=4, save_every=9)
    assert due_steps(intervals.log, 4) == [2, 4]
    assert due_steps(intervals.evaluate, 4) == [4]
    assert due_steps(intervals.save, 4) == [4]


def scores(accuracy):
    return {"test/accuracy": accuracy, "test/loss": 1.0}


def test_the_first_scores_are_the_best_even_if_they_are_0():
    assert Best().improves(scores(0.0))


def test_only_better_or_equal_scores_are_the_best():
    best = Best()
    accuracies = [0.5, 0.4, 0.5, 0.49, 0.6, 0.59]
    assert [best.improves(scores(a)) for a in accuracies] == [True, False, True, False, True, False]
    assert best.score == (0.6, "test", "accuracy")


def test_a_resumed_run_compares_with_its_earlier_best():
    best = Best(Score(0.8, "test"))
    assert not best.improves(scores(0.7))
    assert best.improves(scores(0.8))


def test_a_step_that_was_not_evaluated_is_never_the_best():
    best = Best()
    assert not best.improves(None)
    best.improves(scores(0.3))
    assert not best.improves(None)
    assert best.score == (0.3, "test", "accuracy")


def test_scores_of_a_validation_split_are_compared_in_the_same_way():
    best = Best(Score(0.5, "test"))
    assert not best.improves({"validation/accuracy": 0.4, "validation/loss": 1.0})
    assert best.improves({"validation/accuracy": 0.6, "validation/loss": 1.0})
    assert best.score == (0.6, "validation", "accuracy")


def test_of_losses_the_lowest_is_the_best_and_one_that_is_not_finite_never():
    best = Best(best_by="loss")
    losses = [2.0, 2.5, float("nan"), 1.5, float("inf"), 1.5]
    found = [best.improves({"test/loss": loss, "test/accuracy": 0.5}) for loss in losses]
    assert found == [True, False, False, True, False, True]


def test_evaluations_are_counted_since_the_first_with_the_best_score():
    def since(*losses, by="loss"):
        rows = [{"step": 5, "train/loss": 1.0}]
        rows += [{"step": 9, "test/loss": loss, "test/accuracy": 1 - loss} for loss in losses]
        return evals_since_best(rows, best_by=by)

    assert since() == since(0.5) == since(0.9, 0.4) == 0
    assert since(0.5, 0.6) == since(0.5, 0.5) == 1  # as good is no better
    assert since(0.5, 0.6, 0.4, 0.41, float("nan"), 0.9) == 3
    assert since(0.5, 0.6, 0.4, 0.41, by="accuracy") == 1
    assert since(0.5, 0.6, by="balanced_accuracy") == 0  # of an earlier version, which did not write it
