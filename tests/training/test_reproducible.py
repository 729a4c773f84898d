"""Tests that runs with `reproducible` have the same bits on any number of devices and processes, kills between.

Each start is a process of its own, because JAX counts its devices once.
"""

import time

import pytest
from several_processes import arguments, finish, start_all, state_at
from small_runs import rows

from mlpmixer_flax import UserError
from mlpmixer_flax.training.reproducible import check_threads

# Odd sizes, so that the last part of every loop over numbers is another one. Everything that changes an update is on.
REPRODUCIBLE = {
    "reproducible": 8,
    "batch_size": 32,
    "accumulation_steps": 2,
    "model.hidden_dim": 37,
    "model.tokens_mlp_dim": 13,
    "model.channels_mlp_dim": 26,
    "model.num_blocks": 1,
    "model.dropout_rate": 0.1,
    "model.stochastic_depth_rate": 0.1,
    "augment.crop_padding_px": 1,
    "augment.mixup_alpha": 0.0,  # slow to compile
    "augment.cutmix_alpha": 0.0,
    "optimizer.sam_rho": 0.05,
    "optimizer.weight_decay": 0.1,
    "freeze": "stem",
    "class_weights": "balanced",
    "ema_decay": 0.9,
    "total_steps": 12,
    "log_every_steps": 1,
    "eval_every_steps": 6,
    "save_every_steps": 2,
    "keep_checkpoints": 20,
}


def train(workdir, *, devices, until=None, processes=1, monkeypatch):
    """Trains a run to its end, or kills it once it has saved step `until`."""
    monkeypatch.setenv("NPROC", "8")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    environment = (lambda index: {}) if processes == 1 else None
    options = [*arguments(REPRODUCIBLE), f"--workdir={workdir}"]
    started = start_all(processes, "train", *options, environment=environment)
    if until is not None:
        while started[0].poll() is None and not (workdir / "checkpoints" / str(until)).exists():
            time.sleep(0.01)
        started[0].kill()
    statuses, texts, errors = finish(started)
    assert statuses == [0 if until is None else -9] * processes, errors
    return texts[0]


def measured(workdir):
    """Returns the rows of metrics.jsonl by step, without speeds; of a step that was done twice, the last."""
    found = {}
    for row in rows(workdir):
        values = {key: value for key, value in row.items() if key.startswith(("train/", "test/"))}
        found[row["step"], *values] = values
    return found


def assert_same_run(workdir, expected):
    ours, theirs = state_at(workdir, 12), state_at(expected, 12)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.tobytes() == theirs[name].tobytes(), name
    assert len(measured(expected)) == 14  # 12 updates and 2 evaluations
    assert measured(workdir) == measured(expected)


@pytest.mark.long
@pytest.mark.slow
def test_killed_runs_on_1_4_2_and_8_devices_have_the_bits_of_one_run_on_one_device(
    digits_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(REPRODUCIBLE, "distill_from", digits_run)
    expected, workdir = tmp_path / "uninterrupted", tmp_path / "run"
    assert "on 1 x cpu" in train(expected, devices=1, monkeypatch=monkeypatch)
    for devices, until in [(1, 2), (4, 4), (2, 8)]:
        train(workdir, devices=devices, until=until, monkeypatch=monkeypatch)
    printed = train(workdir, devices=4, processes=2, monkeypatch=monkeypatch)
    assert "on 8 x cpu" in printed and "continuing from step" in printed
    assert_same_run(workdir, expected)


def test_another_number_of_threads_is_refused(monkeypatch):
    monkeypatch.setenv("NPROC", "8")
    check_threads(8)
    for unset in (True, False):
        if unset:
            monkeypatch.delenv("NPROC")
        else:
            monkeypatch.setenv("NPROC", "4")
        with pytest.raises(UserError, match="reproducible=8 on CPUs needs 8 threads, .* with NPROC=8 in the"):
            check_threads(8)
