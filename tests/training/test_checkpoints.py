"""Tests what a run keeps on disk, restores exactly, refuses, and survives if files are damaged."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.rundir import check_class_names, check_workdir, read_class_names, read_weights, write_run
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import Checkpoints

PLACE = sharding.replicated(sharding.make_mesh())


def state(step):
    tree = {"step": jnp.int32(step), "params": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}, "ema": None}
    return jax.device_put(tree, PLACE)


def scores(accuracy):
    return {"test/accuracy": accuracy, "test/loss": 1.0}


def save(workdir, accuracies, keep=2):
    """Saves a step for each accuracy, and closes the checkpoints; None = a step that was not evaluated."""
    checkpoints = Checkpoints(workdir, keep=keep)
    for step, accuracy in accuracies.items():
        checkpoints.save(step, state(step), None if accuracy is None else scores(accuracy))
    checkpoints.close()


def kept(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())


def restore(workdir):
    checkpoints = Checkpoints(workdir, keep=2)
    step, restored = checkpoints.restore(jax.eval_shape(lambda: state(0)), PLACE)
    checkpoints.close()
    return step, restored


def test_the_newest_is_restored_exactly(tmp_path):
    save(tmp_path, {1: 0.5, 2: None})
    step, restored = restore(tmp_path)
    assert step == 2
    chex.assert_trees_all_equal(restored, state(2))
    assert restored["params"]["kernel"].sharding == PLACE


def test_without_checkpoints_the_step_is_0(tmp_path):
    assert restore(tmp_path) == (0, None)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: None, 6: 0.2})
    assert kept(tmp_path) == [2, 5, 6]
    reopened = Checkpoints(tmp_path, keep=2)
    assert reopened.best() == (2, 0.9)
    reopened.close()
    save(tmp_path, {7: 0.95, 8: None})  # by a later process
    assert kept(tmp_path) == [7, 8]


def test_saving_a_step_twice_is_harmless(tmp_path):
    save(tmp_path, {1: 0.5})
    save(tmp_path, {1: 0.5, 2: None})
    assert kept(tmp_path) == [1, 2]


def test_a_checkpoint_half_written_by_a_killed_run_is_ignored(tmp_path):
    save(tmp_path, {1: None})
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1").mkdir()
    assert restore(tmp_path)[0] == 1


def files_with_content(folder: Path):
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 0]


def test_if_the_newest_checkpoint_is_truncated_the_one_before_is_restored(tmp_path, capsys):
    save(tmp_path, {1: None, 2: None})
    for file in files_with_content(tmp_path / "checkpoints" / "2" / "default" / "d"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    step, restored = restore(tmp_path)
    assert step == 1
    chex.assert_trees_all_equal(restored, state(1))
    assert "checkpoint 2 cannot be read, trying the one before" in capsys.readouterr().out
    assert kept(tmp_path) == [1] and (tmp_path / "damaged" / "2").is_dir()
    save(tmp_path, {2: 0.5})  # the step can be reached and saved again
    assert restore(tmp_path)[0] == 2


@pytest.mark.parametrize("folder", [".", "default/d", "default/ocdbt.process_0", "metrics"])
def test_an_empty_file_never_leads_to_a_wrong_state(tmp_path, folder):
    """If files of the newest checkpoint are empty, either its exact state is restored, or the older state."""
    save(tmp_path, {1: 0.5, 2: 0.6})
    files = files_with_content(tmp_path / "checkpoints" / "2" / folder)
    assert files
    for file in files:
        file.write_bytes(b"")
    step, restored = restore(tmp_path)
    chex.assert_trees_all_equal(restored, state(step))


def test_the_best_weights_are_found_if_metrics_of_a_checkpoint_are_damaged(tmp_path):
    save(tmp_path, {1: 0.9, 2: 0.5, 3: None}, keep=3)
    assert read_weights(tmp_path, "best")[0] == 1
    for file in files_with_content(tmp_path / "checkpoints" / "1" / "metrics"):
        file.write_bytes(b"")
    step, params = read_weights(tmp_path, "best")
    assert step == 2
    chex.assert_trees_all_equal(params, jax.device_get(state(2)["params"]))


def test_class_names_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="class_names.json cannot be read .* is incomplete; choose another"):
        read_class_names(tmp_path)


def test_if_no_checkpoint_can_be_read_the_run_is_refused_and_nothing_is_moved(tmp_path):
    save(tmp_path, {1: None})
    for file in files_with_content(tmp_path / "checkpoints" / "1"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match="none of the checkpoints 1 in .* can be read: choose another --workdir"
    ):
        restore(tmp_path)
    assert kept(tmp_path) == [1]


CONFIG = {"seed": 0, "optimizer": {"name": "sgd"}, "preprocess": {"mean": (0.5,)}}


def test_the_same_config_may_continue_and_another_is_refused_with_the_keys(tmp_path):
    check_workdir(tmp_path / "new", CONFIG)
    assert not (tmp_path / "new").exists()
    write_run(tmp_path, CONFIG, class_names=["cat", "châtaigne"])
    check_workdir(tmp_path, CONFIG)
    other = {**CONFIG, "seed": 1, "optimizer": {"name": "adam"}}
    message = "with another config .optimizer.name was 'sgd', is 'adam', seed was 0, is 1.: choose another --workdir"
    with pytest.raises(UserError, match=message):
        check_workdir(tmp_path, other)
    assert json.loads((tmp_path / "class_names.json").read_text()) == ["cat", "châtaigne"]
    assert json.loads((tmp_path / "config.json").read_text())["preprocess"] == {"mean": [0.5]}


def test_a_workdir_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write to workdir .*not a directory"):
            check_workdir(workdir, CONFIG)
    with pytest.raises(UserError, match="cannot write to /proc/nothing"):
        write_run(Path("/proc/nothing/can/be/made/here"), CONFIG, class_names=[])


def test_a_path_that_orbax_reads_as_a_pattern_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Orbax reads \[ in a path as a pattern; choose a path without it"):
        check_workdir(tmp_path / "runs [1]" / "b16", CONFIG)


def test_classes_that_differ_from_those_of_the_run_are_refused(tmp_path):
    check_class_names(tmp_path, ["cat", "dog"])
    write_run(tmp_path, CONFIG, class_names=["cat", "dog"])
    check_class_names(tmp_path, ["cat", "dog"])
    with pytest.raises(
        UserError, match=r"run with other classes \(gone: 'cat'; new: 'a cat'\): restore the dataset"
    ):
        check_class_names(tmp_path, ["a cat", "dog"])


def test_a_config_json_without_a_config_is_refused(tmp_path):
    for text, message in (
        ("{", "config.json cannot be read .*choose another --workdir"),
        ("[]", "config.json is not the config of a run: choose another --workdir"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            check_workdir(tmp_path, CONFIG)


def test_checkpoints_of_an_unknown_config_are_refused(tmp_path):
    save(tmp_path, {1: None})
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        check_workdir(tmp_path, CONFIG)


def test_a_name_that_no_file_system_accepts_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot use workdir"):
        check_workdir(tmp_path / ("x" * 300), CONFIG)
