"""A run on disk: what is kept, what is restored, what is refused, what survives damage."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.rundir import check_class_names, check_workdir, write_run
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import Checkpoints

PLACE = sharding.replicated(sharding.make_mesh())


def state(step):
    tree = {"step": jnp.int32(step), "params": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}, "ema": None}
    return jax.device_put(tree, PLACE)


def scores(accuracy):
    return {"test/accuracy": accuracy, "test/loss": 1.0}


def save(workdir, accuracies, keep=2):
    """A closed run that saved a step for each accuracy; None = a step that wasn't evaluated."""
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


def test_newest_is_restored_exactly(tmp_path):
    save(tmp_path, {1: 0.5, 2: None})
    step, restored = restore(tmp_path)
    assert step == 2
    chex.assert_trees_all_equal(restored, state(2))
    assert restored["params"]["kernel"].sharding == PLACE


def test_nothing_there_gives_step_0(tmp_path):
    assert restore(tmp_path) == (0, None)


def test_newest_and_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: None, 6: 0.2})
    assert kept(tmp_path) == [2, 5, 6]
    reopened = Checkpoints(tmp_path, keep=2)
    assert reopened.best() == (2, 0.9)
    reopened.close()
    save(tmp_path, {7: 0.95, 8: None})  # a later process finds the new best
    assert kept(tmp_path) == [7, 8]


def test_saving_a_step_twice_is_harmless(tmp_path):
    save(tmp_path, {1: 0.5})
    save(tmp_path, {1: 0.5, 2: None})
    assert kept(tmp_path) == [1, 2]


def test_what_a_kill_left_half_written_is_ignored(tmp_path):
    save(tmp_path, {1: None})
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1").mkdir()
    assert restore(tmp_path)[0] == 1


def damaging_files(folder: Path):
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 0]


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    save(tmp_path, {1: None, 2: None})
    for file in damaging_files(tmp_path / "checkpoints" / "2" / "default" / "d"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    step, restored = restore(tmp_path)
    assert step == 1
    chex.assert_trees_all_equal(restored, state(1))
    assert "checkpoint 2 cannot be read, trying the one before" in capsys.readouterr().out
    assert kept(tmp_path) == [1] and (tmp_path / "damaged" / "2").is_dir()
    save(tmp_path, {2: 0.5})  # the step can be reached and saved again
    assert restore(tmp_path)[0] == 2


@pytest.mark.parametrize("folder", [".", "default/d", "default/ocdbt.process_0", "metrics"])
def test_no_file_cut_short_goes_unnoticed(tmp_path, folder):
    """Whichever file of the newest checkpoint is empty: the state is restored exactly, or the older one is."""
    save(tmp_path, {1: 0.5, 2: 0.6})
    files = damaging_files(tmp_path / "checkpoints" / "2" / folder)
    assert files
    for file in files:
        file.write_bytes(b"")
    step, restored = restore(tmp_path)
    chex.assert_trees_all_equal(restored, state(step))


def test_no_readable_checkpoint_is_refused_and_nothing_moved(tmp_path):
    save(tmp_path, {1: None})
    for file in damaging_files(tmp_path / "checkpoints" / "1"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match="none of the checkpoints 1 in .* can be read: choose another --workdir"
    ):
        restore(tmp_path)
    assert kept(tmp_path) == [1]


CONFIG = {"seed": 0, "optimizer": {"name": "sgd"}, "preprocess": {"mean": (0.5,)}}


def test_same_config_may_continue_and_another_is_refused_with_the_keys(tmp_path):
    check_workdir(tmp_path / "new", CONFIG)
    assert not (tmp_path / "new").exists()
    write_run(tmp_path, CONFIG, class_names=["cat", "châtaigne"])
    check_workdir(tmp_path, CONFIG)
    other = {**CONFIG, "seed": 1, "optimizer": {"name": "adam"}}
    message = (
        "another config .optimizer.name was 'sgd', is 'adam', seed was 0, is 1.: choose another --workdir"
    )
    with pytest.raises(UserError, match=message):
        check_workdir(tmp_path, other)
    assert json.loads((tmp_path / "class_names.json").read_text()) == ["cat", "châtaigne"]
    assert json.loads((tmp_path / "preprocess.json").read_text()) == {"mean": [0.5]}


def test_workdir_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write to workdir .*not a directory"):
            check_workdir(workdir, CONFIG)
    with pytest.raises(UserError, match="cannot write to /proc/nothing"):
        write_run(Path("/proc/nothing/can/be/made/here"), CONFIG, class_names=[])


def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\[ in a path for a pattern"):
        check_workdir(tmp_path / "runs [1]" / "b16", CONFIG)


def test_other_classes_than_those_of_the_run_are_refused(tmp_path):
    check_class_names(tmp_path, ["cat", "dog"])
    write_run(tmp_path, CONFIG, class_names=["cat", "dog"])
    check_class_names(tmp_path, ["cat", "dog"])
    with pytest.raises(
        UserError, match=r"run of other classes \(gone: 'cat'; new: 'a cat'\): put the dataset back"
    ):
        check_class_names(tmp_path, ["a cat", "dog"])


def test_config_json_that_is_no_json_is_refused(tmp_path):
    for text, message in (("{", "config.json cannot be read"), ("[]", "config.json holds no config")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            check_workdir(tmp_path, CONFIG)


def test_checkpoints_of_an_unknown_config_are_refused(tmp_path):
    save(tmp_path, {1: None})
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        check_workdir(tmp_path, CONFIG)


def test_a_name_no_file_system_takes_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot use workdir"):
        check_workdir(tmp_path / ("x" * 300), CONFIG)
