"""Means, speed and waiting between two reports, and metrics that are not finite."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax.training.report import Recent


def values(loss, accuracy=0.5):
    return {"loss": jnp.float32(loss), "accuracy": jnp.float32(accuracy)}


def test_recent_returns_means_and_speed_since_the_last_summary(clock):
    recent = Recent(32, [])
    for step, loss in enumerate([1.0, 2.0, 6.0], 1):
        recent.add(step, values(loss, loss / 10))
    clock.now += 4
    summary = recent.summary()
    assert summary == pytest.approx(
        {"train/loss": 3.0, "train/accuracy": 0.3, "images_per_second": 3 * 32 / 4, "data_wait": 0.0}
    )
    assert all(type(value) is float for value in summary.values())
    recent.add(4, values(10.0))
    clock.now += 2
    assert recent.summary() == {
        "train/loss": 10.0,
        "train/accuracy": 0.5,
        "images_per_second": 16.0,
        "data_wait": 0.0,
    }


def test_stored_metrics_with_other_names_are_left_out():
    recent = Recent(32, [{"loss": 9.0}, {}, {"loss": 2.0, "accuracy": 0.5}])
    recent.add(4, values(1.0))
    assert recent.summary()["train/loss"] == 1.5


def test_the_wait_for_batches_is_a_share_of_the_time(clock):
    recent = Recent(32, [])

    def batches():
        for _ in range(2):
            clock.now += 3
            yield {}
            clock.now += 2  # the next batch is begun only when it is asked for

    for step, _ in enumerate(recent.timing(batches()), 1):
        recent.add(step, values(1.0))
        clock.now += 1
    assert recent.summary()["data_wait"] == pytest.approx((3 + 2 + 3) / (3 + 1 + 2 + 3 + 1 + 2))
    clock.now += 1
    recent.add(3, values(1.0))
    assert recent.summary()["data_wait"] == 0


def test_a_batch_that_is_made_while_the_device_computes_is_not_waited_for():
    recent = Recent(32, [])
    matrix = jnp.ones((500, 500))
    update = jax.jit(lambda x: jax.lax.fori_loop(0, 500, lambda _, y: jnp.tanh(y @ x), x)[0, 0])
    update.lower(matrix).compile()

    def batches():
        yield {}
        time.sleep(0.005)  # a small part of the time of the update
        yield {}
        recent.waiting[-1][1]["loss"].block_until_ready()
        time.sleep(0.2)
        yield {}

    update(matrix).block_until_ready()
    batches = recent.timing(batches())
    next(batches)
    recent.waited = 0.0
    recent.add(1, {"loss": update(matrix)})
    next(batches)
    assert recent.waited == 0
    next(batches)
    assert recent.waited >= 0.2


def test_a_pause_does_not_count_in_the_speed(clock):
    recent = Recent(10, [])
    clock.now += 1
    recent.add(1, values(1.0))
    with recent.paused():
        clock.now += 100
    with recent.paused():
        clock.now += 50
    clock.now += 1
    recent.add(2, values(2.0))
    assert recent.summary()["images_per_second"] == pytest.approx(10.0)


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_metric_that_is_not_finite_stops_the_run_with_name_and_step(name, value, shown):
    recent = Recent(1, [])
    bad = {**values(1.0), "gradient_norm": np.float32(1.0), name: np.float32(value)}
    recent.add(7, bad)  # is fetched when the device works on the next step
    with pytest.raises(
        FloatingPointError, match=rf"^{name} is {shown} at step 7: .*lower optimizer.learning_rate"
    ):
        recent.add(8, values(1.0))


def test_a_metric_that_is_not_finite_is_found_before_a_summary_and_before_a_pause():
    recent = Recent(1, [])
    recent.add(3, values(np.nan))
    with pytest.raises(FloatingPointError, match="loss is nan at step 3"):
        recent.summary()
    recent.add(4, values(np.inf))
    with pytest.raises(FloatingPointError, match="loss is inf at step 4"), recent.paused():
        pytest.fail("a checkpoint would be saved here")
