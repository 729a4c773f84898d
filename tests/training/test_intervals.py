"""Tests when the loop logs, evaluates and saves, and which scores are the best."""

from mlpmixer_flax.training.intervals import Best, Intervals


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
    assert best.accuracy == 0.6


def test_a_resumed_run_compares_with_its_earlier_best():
    best = Best(0.8)
    assert not best.improves(scores(0.7))
    assert best.improves(scores(0.8))


def test_a_step_that_was_not_evaluated_is_never_the_best():
    best = Best()
    assert not best.improves(None)
    best.improves(scores(0.3))
    assert not best.improves(None)
    assert best.accuracy == 0.3


def test_scores_of_a_validation_split_are_compared_in_the_same_way():
    best = Best(0.5)
    assert not best.improves({"validation/accuracy": 0.4, "validation/loss": 1.0})
    assert best.improves({"validation/accuracy": 0.6, "validation/loss": 1.0}) and best.accuracy == 0.6
