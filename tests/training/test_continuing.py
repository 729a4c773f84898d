"""Tests with which config, directory and length a run may begin or continue, on real runs of the program."""

import json
import re
import shutil

import chex
import pytest
from flax.traverse_util import flatten_dict
from made_folders import names, write

from mlpmixer_flax import UserError
from mlpmixer_flax.config import CHANGE_NO_UPDATE, LENGTH, flatten, get_config, resolve
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.rundir import read_config, saved_steps, write_run
from mlpmixer_flax.train import main
from mlpmixer_flax.training.continuing import (
    check_class_names,
    compare_configs,
    describe_changes,
    usable_workdir,
)
from mlpmixer_flax.training.report import read_metrics

# Small, with the randomness of augmentation
pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMALL = ["--config=digits.py", "--config.model.hidden_dim=16", "--config.model.channels_mlp_dim=16"]
SMALL += ["--config.model.num_blocks=1", "--config.augment.crop_padding_px=1", "--config.batch_size=32"]
SMALL += ["--config.augment.mixup_alpha=0", "--config.save_every_steps=10", "--config.eval_every_steps=10"]


def train(workdir, *arguments):
    return main([*SMALL, f"--workdir={workdir}", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a run of 20 steps with a cosine schedule that has checkpoints 10 and 20."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train(workdir, "--config.total_steps=20") == 0
    return workdir


def stopped(run, copy):
    """Returns a copy of a run as if it had been killed after its checkpoint of step 10."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "20")
    return copy


def test_keys_that_may_change_exist():
    assert {*CHANGE_NO_UPDATE, *LENGTH} <= flatten(get_config()).keys()


EXACT = {
    "num_workers": "2",
    "cache_bytes": "0",  # so that the workers are used
    "data_dir": "/elsewhere",
    "log_every_steps": "3",
    "eval_every_steps": "0",
    "eval_every_epochs": "0.1",
    "save_every_steps": "0",
    "save_every_epochs": "0.1",
    "keep_checkpoints": "5",
    "best_by": "loss",
    "early_stopping_evals": "1000",
}


@pytest.mark.parametrize("changes", [EXACT, {"accumulation_steps": "2"}, {"model.remat": "true"}], ids=list)
def test_a_key_that_changes_no_update_may_change_between_two_starts(finished, tmp_path, capsys, changes):
    workdir = stopped(finished, tmp_path / "run")
    given = [f"--config.{key}={value}" for key, value in changes.items()]
    assert train(workdir, "--config.total_steps=20", *given) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "continuing from step 10 of" in out
    (line,) = [line for line in out.splitlines() if line.startswith("continuing with ")]
    stored = flatten_dict(read_config(workdir), sep=".")
    for key, value in changes.items():
        assert re.search(rf"{re.escape(key)}=\S+ \(was ", line)
        assert str(stored[key]).lower() == value
    assert line.endswith("; updates stay the same, except for rounding") == (changes != EXACT)
    weights = [read_weights(run)[1] for run in (workdir, finished)]
    if changes == EXACT:
        chex.assert_trees_all_equal(*weights)
    else:
        chex.assert_trees_all_close(*weights, atol=1e-4)

    assert train(workdir, "--config.total_steps=20", *given) == 0  # the new values are stored
    assert "continuing with" not in capsys.readouterr().out


def test_a_run_that_was_to_stop_before_its_last_checkpoint_stops_there(tmp_path, capsys):
    workdir = tmp_path / "run"
    # With this learning rate, the loss stays the same.
    frozen = ["--config.optimizer.learning_rate=1e-30", "--config.best_by=loss", "--config.total_steps=10"]
    often = ["--config.eval_every_steps=2", "--config.save_every_steps=1", "--config.keep_checkpoints=20"]
    assert train(workdir, *frozen, *often) == 0
    assert "stopped early" not in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints" / "10")  # as if the run had been killed after step 9
    assert train(workdir, *frozen, *often, "--config.early_stopping_evals=2") == 0
    assert capsys.readouterr().out.count("stopped early at step 9:") == 1
    assert max(saved_steps(workdir)) == 9


def test_all_keys_that_may_change_are_tested_above():
    elsewhere = {
        "mesh.fsdp",  # tests/training/test_elastic.py, which has several devices
        "tracker",  # tests/training/test_tracker.py, which has trackers
    }
    assert {*EXACT, *elsewhere, "accumulation_steps", "model.remat"} == {*CHANGE_NO_UPDATE}


@pytest.mark.parametrize(
    "change", ["seed=5", "batch_size=16", "skip_bad_images=true", "train_split=train[:90%]"]
)
def test_another_key_may_not(finished, tmp_path, capsys, change):
    workdir = stopped(finished, tmp_path / "run")
    assert train(workdir, "--config.total_steps=20", "--config.num_workers=1", f"--config.{change}") == 2
    error = capsys.readouterr().err
    assert f"{change.partition('=')[0]} was " in error and "choose another --workdir" in error
    assert "num_workers" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ('"total_steps": 0, "total_epochs": "abc"', "is damaged (total_epochs='abc' has the wrong type: "),
        ('"total_steps": 0, "total_epochs": 1e400', "is damaged (total_epochs=inf must be at most 1000000, "),
        ('"a.b": 1, "__class__": {"c": 2}', "holds a run with another config (__class__.c was 2, is None"),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_damaged_config_of_a_run_is_named_and_stays_as_it_is(
    finished, tmp_path, capsys, changes, message, is_folder
):
    (tmp_path / "run").mkdir()
    config = (finished / "config.json").read_text().rpartition("}")[0] + f", {changes}}}"
    (tmp_path / "run" / "config.json").write_text(config)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    write(tmp_path / "photos", *names("cat", 2), *names("dog", 2))
    data = str(tmp_path / "photos") if is_folder else "--config=digits.py"
    assert main([data, f"--workdir={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == config


def test_a_run_whose_config_lacks_the_length_continues(finished, tmp_path, capsys):
    workdir = stopped(finished, tmp_path / "run")
    config = read_config(workdir)
    del config["total_steps"]
    (workdir / "config.json").write_text(json.dumps(config))
    assert train(workdir, "--config.total_steps=11") == 0
    assert "length: 11 steps instead of 1,343" in capsys.readouterr().out


# --- longer and shorter


def test_a_finished_run_is_trained_longer_on_the_schedule_of_the_new_length(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    assert train(workdir, "--config.total_steps=40") == 0
    out = capsys.readouterr().out
    assert "continuing with total_steps=40 (was 20)" in out
    # After 20 of 40 steps, a cosine from 0.003 has half of this.
    assert (
        "\nlength: 40 steps instead of 20; the cosine schedule is now that of the new length:\n"
        "  the learning rate goes from 1.85e-05 to 0.0015 at step 20\n"
    ) in out
    assert read_weights(workdir)[0] == 40 and read_config(workdir)["total_steps"] == 40
    rates = {row["step"]: row["train/learning_rate"] for row in read_metrics(workdir / "metrics.jsonl") if "train/loss" in row}  # fmt: skip
    assert rates.keys() == {20, 40}

    # A run that is killed after this continues to the same bits.
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "40")
    assert train(again, "--config.total_steps=40") == 0
    assert "instead of" not in capsys.readouterr().out
    chex.assert_trees_all_equal(read_weights(again)[1], read_weights(workdir)[1])


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_a_schedule_that_does_not_depend_on_the_length_goes_on_to_the_same_bits(tmp_path, capsys, schedule):
    schedule = [f"--config.schedule.name={schedule}", "--config.schedule.warmup_steps=5"]
    assert train(tmp_path / "whole", *schedule, "--config.total_steps=30") == 0
    assert train(tmp_path / "parts", *schedule, "--config.total_steps=20") == 0
    assert train(tmp_path / "parts", *schedule, "--config.total_steps=30") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^length: 30 steps instead of 20; the \w+ schedule goes on, learning rate 0.00\d+$", out, re.M
    )
    weights = [read_weights(tmp_path / run)[1] for run in ("whole", "parts")]
    chex.assert_trees_all_equal(*weights)


def test_a_run_under_way_is_made_longer_and_shorter(finished, tmp_path, capsys):
    for total, rate in [(40, "0.00256"), (15, "0.00075")]:
        workdir = stopped(finished, tmp_path / str(total))
        assert train(workdir, f"--config.total_steps={total}") == 0
        out = capsys.readouterr().out
        assert f"the learning rate goes from 0.00173 to {rate} at step 10\n" in out
        assert read_weights(workdir)[0] == total


def test_epochs_and_steps_of_the_same_length_are_the_same(finished, tmp_path, capsys):
    """1,433 images in batches of 32 are 44.8 steps per epoch."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    assert train(workdir, "--config.total_epochs=0.45") == 0
    out = capsys.readouterr().out
    assert "total_epochs=0.45 (was 30.0), total_steps=0 (was 20)" in out and "instead of" not in out
    assert train(workdir, "--config.total_epochs=1") == 0
    assert "length: 45 steps instead of 20" in capsys.readouterr().out
    assert read_weights(workdir)[0] == 45


def test_a_length_below_what_is_done_is_refused_and_nothing_is_written(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    assert train(workdir, "--config.total_steps=15") == 2
    error = capsys.readouterr().err
    assert re.search(
        r"already done 20 steps \(0.4\d+ epochs\), and total_steps=15, .* is less \(15 steps\)", error
    )
    assert {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()} == before


def test_a_run_without_a_checkpoint_may_have_any_length(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    assert train(workdir, "--config.total_steps=5") == 0
    assert "instead of" not in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl") if "test/loss" in row] == [5]


# --- without training

CONFIG = resolve(get_config(), {}).to_dict()


def test_the_same_config_may_continue_and_another_is_refused_with_the_keys(tmp_path):
    assert compare_configs(tmp_path, {}, CONFIG) == []
    stored = json.loads(json.dumps(CONFIG))  # with lists for tuples
    assert compare_configs(tmp_path, stored, CONFIG) == []
    other = {**CONFIG, "seed": 1, "optimizer": {**CONFIG["optimizer"], "name": "adam"}, "num_workers": 3}
    message = "with another config .optimizer.name was 'adamw', is 'adam', seed was 0, is 1.: choose another --workdir"
    with pytest.raises(UserError, match=message):
        compare_configs(tmp_path, stored, other)


def test_a_key_that_is_new_in_this_version_has_its_base_value_in_old_runs(tmp_path):
    stored = json.loads(json.dumps(CONFIG))
    del stored["optimizer"]["sam_rho"], stored["num_workers"]
    assert compare_configs(tmp_path, stored, CONFIG) == []
    (change,) = compare_configs(tmp_path, stored, {**CONFIG, "num_workers": 2})
    assert describe_changes([change]) == "continuing with num_workers=2 (was 0)"
    (change,) = compare_configs(tmp_path, {**stored, "data_dir": "a\x1b" * 9999}, CONFIG)
    assert "(was a\\x1ba\\x1b" in (line := describe_changes([change])) and len(line) < 500
    with pytest.raises(UserError, match="optimizer.sam_rho was 0.0, is 0.1"):
        compare_configs(tmp_path, stored, {**CONFIG, "optimizer": {**CONFIG["optimizer"], "sam_rho": 0.1}})


def test_a_workdir_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write to workdir .*not a directory"):
            usable_workdir(workdir)
    with pytest.raises(UserError, match=r"Orbax reads \[ in a path as a pattern; choose a path without it"):
        usable_workdir(tmp_path / "runs [1]" / "b16")
    with pytest.raises(UserError, match="cannot use workdir"):
        usable_workdir(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="the run directory has an empty name: give one"):
        usable_workdir("")
    for url in ("https://example.org/run", "xyz://bucket/run"):
        with pytest.raises(
            UserError, match=f"^workdir '{url}' is a URL, and only local paths and those such as s3://"
        ):
            usable_workdir(url)
    with pytest.raises(UserError, match=r"cannot use workdir '.*runs\\udcff': its name is not valid UTF-8"):
        usable_workdir(tmp_path / "runs\udcff")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        usable_workdir(tmp_path)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert usable_workdir("~/runs/a") == tmp_path / "runs" / "a"
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="cannot use workdir ~nobody-of-this-name/run"):
        usable_workdir("~nobody-of-this-name/run")


def test_a_config_json_without_a_config_is_refused(tmp_path):
    for text, message in (
        ("{", "config.json cannot be read .*choose another --workdir"),
        ("[]", "config.json is not the config of a run: choose another --workdir"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_config(tmp_path)


def test_classes_that_differ_from_those_of_the_run_are_refused(tmp_path):
    check_class_names(tmp_path, ["cat", "dog"])
    write_run(tmp_path, CONFIG, class_names=["cat", "dog"])
    check_class_names(tmp_path, ["cat", "dog"])
    with pytest.raises(
        UserError, match=r"run with other classes \(gone: 'cat'; new: 'a cat'\): restore the dataset"
    ):
        check_class_names(tmp_path, ["a cat", "dog"])
    with pytest.raises(UserError) as error:
        check_class_names(tmp_path, ["a b " * 9999, "dog"])
    assert len(str(error.value)) < 500


def test_a_path_that_is_only_too_long_with_the_names_below_it_is_refused():
    with pytest.raises(UserError, match="cannot use workdir .*File name too long.*: choose another"):
        usable_workdir("none/" + "9" * 4080)
