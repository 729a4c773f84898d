"""Tests benchmarks/levers.py: what its tables say, which levers it puts together, and one run."""

import pytest
from copied_reproduce import BENCHMARKS, imported

from mlpmixer_flax import UserError, get_dataset_info
from mlpmixer_flax.training.configfile import load_config


@pytest.fixture
def levers(monkeypatch):
    return imported("levers", BENCHMARKS, monkeypatch)


def scores(levers, held_out):
    """Returns the scores of a run: each column is one point above the column before."""
    return {column: held_out + number for number, column in enumerate(levers.COLUMNS)}


def test_every_lever_is_a_config_and_no_training_image_is_held_out(levers):
    for name, changes in levers.all_runs().items():
        config = load_config("nano_cifar10.py", {**levers.BASE, **changes})
        assert config.test_split == levers.SPLITS["held out"] == "train[90%:]", name
        assert config.train_split == "train[:5%]", name


def test_the_best_value_of_each_lever_that_gains_more_than_noise_is_put_together(levers):
    found = {name: [scores(levers, 40.0)] * 2 for name in levers.all_runs()}
    found["base"] = [scores(levers, value) for value in (39.0, 40.0, 41.0)]  # the limit is 42
    found["EMA: 0.99"] = [scores(levers, 41.9), scores(levers, 42.0)]
    found["SAM: rho 0.05"] = [scores(levers, 50.0), {}]  # one run diverged
    found["Muon: learning rate 0.002"] = [scores(levers, 43.0)] * 2
    found["Muon: learning rate 0.004"] = [scores(levers, 44.0)] * 2
    found["patches of 2 px"] = [scores(levers, 60.0)] * 2
    assert levers.together(found) == levers.LEVERS["Muon"]["learning rate 0.004"]


def test_the_table_has_means_and_failures(levers):
    found = {
        "base": [scores(levers, 40.0), scores(levers, 42.0)],
        "SAM: rho 0.05": [scores(levers, 50.0), {}],
        "EMA: 0.99": [scores(levers, 42.5)],
    }
    head, dashes, *rows = levers.table(found).splitlines()
    assert {line.count("|") for line in (head, dashes, *rows)} == {8}
    assert rows[0] == "| base |  | 41.00 | 42.00 | 43.00 | 44.00 | 40.00, 42.00 |"
    assert rows[1].startswith("| SAM: rho 0.05 | diverged with 1 of 2 seeds |")
    assert rows[2] == "| EMA: 0.99 | +1.50 | 42.50 | 43.50 | 44.50 | 45.50 | 42.50 |"


@pytest.mark.long
def test_a_run_is_scored_once_on_both_splits_and_a_diverged_one_is_empty(levers, tmp_path, monkeypatch):
    try:
        get_dataset_info("cifar10")
    except UserError:
        pytest.skip("cifar10 is not prepared")
    few = {
        "train_split": "train[:128]",
        "test_split": "train[-60:]",
        "total_epochs": 1.0,
        "log_every_steps": 1,
    }
    monkeypatch.setattr(levers, "BASE", {**levers.BASE, **few})
    monkeypatch.setattr(levers, "SPLITS", {"held out": "train[-60:]", "test": "test[:40]"})
    found = levers.run(tmp_path / "base", {"seed": 1})
    assert list(found) == levers.COLUMNS and all(0 <= value <= 100 for value in found.values())
    assert {round(found["held out"] * 0.6, 6) % 1, round(found["test"] * 0.4, 6) % 1} == {
        0
    }  # of 60 and 40 images
    written = (tmp_path / "base" / "levers.json").stat().st_mtime_ns
    assert levers.run(tmp_path / "base", {"seed": 1}) == found
    assert (tmp_path / "base" / "levers.json").stat().st_mtime_ns == written
    worse = {
        "optimizer.learning_rate": 1e6,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_norm": 0.0,
        "optimizer.name": "sgd",
        "total_epochs": 8.0,
    }
    assert levers.run(tmp_path / "diverged", worse) == {}
