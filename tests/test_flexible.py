"""Tests benchmarks/flexible.py: which models it compares, its table, and a whole experiment of seconds."""

import dataclasses
import json
import sys

import pytest
from copied_reproduce import BENCHMARKS, imported

from mlpmixer_flax.training.configfile import load_config


@pytest.fixture
def flexible(monkeypatch):
    return imported("flexible", BENCHMARKS, monkeypatch)


@pytest.mark.parametrize("name", ["digits", "cifar10", "nano"])
def test_all_models_of_an_experiment_have_the_same_updates_but_for_those_that_say_otherwise(flexible, name):
    experiment = flexible.EXPERIMENTS[name]
    runs = list(flexible.runs(experiment))
    assert len({run.folder for run in runs}) == len(runs)
    lengths, tokens = {}, {}
    for run in runs:
        config = load_config(experiment.config, {**experiment.changes, **run.changes, "init_from": ""})
        lengths.setdefault(run.kind, set()).add((config.total_steps, config.total_epochs))
        if run.kind in ("specialist", "other patches"):
            side = config.preprocess.image_size_px // config.model.patches.size[0]
            tokens.setdefault((run.seed, run.size), set()).add(side)
    assert (
        lengths["flexible"] == lengths["specialist"] == lengths["other patches"]
        and len(lengths["flexible"]) == 1
    )
    assert all(
        len(sides) == 1 for sides in tokens.values()
    )  # other patches: as many tokens as the specialist
    sizes = {run.size for run in runs if run.kind == "specialist"}
    assert sizes == set(experiment.sizes)


def test_the_table_has_the_mean_and_each_seed_and_a_dash_for_what_is_not_done(flexible):
    done = {
        "specialist, seed 0": {"8": 97.0, "16": 90.0},
        "specialist, seed 1": {"8": 98.0},
        "flexible, 5 times, seed 0": {"8": 99.0, "16": 95.0},
    }
    assert flexible.table([8, 16], done)[2:4] == [
        "| 8 px | 97.5 (97.0, 98.0) | – | – | – | 99.0 |",
        "| 16 px | 90.0 | – | – | – | 95.0 |",
    ]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_an_experiment_is_measured_once_with_its_picture(flexible, tmp_path, monkeypatch, capsys):
    experiment = flexible.EXPERIMENTS["digits"]
    small = {
        **experiment.changes,
        "model.num_blocks": 1,
        "model.hidden_dim": 8,
        "total_steps": 6,
        "augment.mixup_alpha": 0.0,
        "test_split": "test[:50]",
    }
    experiment = dataclasses.replace(
        experiment,
        sizes=(4, 8),
        seeds=(0,),
        changes=small,
        finetuning={"total_steps": 3},
        longer={"total_steps": 12},
    )
    monkeypatch.setattr(flexible, "EXPERIMENTS", {"digits": experiment})
    monkeypatch.setattr(sys, "argv", ["flexible.py", "digits", f"--workdir={tmp_path}"])
    flexible.main()
    done = json.loads((tmp_path / "digits" / "results.json").read_text())
    assert set(done) == {f"{kind}, seed 0" for kind in (*flexible.KINDS, "other patches")}
    assert all(set(done[f"{kind}, seed 0"]) == {"4", "8"} for kind in flexible.KINDS)
    assert done["resampled, seed 0"]["8"] == pytest.approx(done["specialist, seed 0"]["8"])
    assert (tmp_path / "digits" / "flexible.png").stat().st_size > 10_000
    first = capsys.readouterr().out.splitlines()[-4:]
    flexible.main()
    again = capsys.readouterr().out
    assert again.splitlines()[-4:] == first and "steps (" not in again  # nothing is trained again

    # From a run that has been trained
    start = f"--start={tmp_path}/digits/specialist_8-seed0"
    monkeypatch.setattr(sys, "argv", ["flexible.py", "digits", f"--workdir={tmp_path}", start])
    flexible.main()
    found = json.loads((tmp_path / "digits_from_run" / "results.json").read_text())
    assert set(found) == {f"{kind}, seed 0" for kind in flexible.KINDS_FROM_START}
    assert all(set(scores) == {"4", "8"} for scores in found.values())
    assert found["resampled, seed 0"] == done["resampled, seed 0"]
