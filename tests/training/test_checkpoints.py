"""Tests what a run keeps on disk, restores exactly, refuses, and survives if files are damaged."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlpmixer_flax import UserError, run_weights
from mlpmixer_flax.checksums import check_files
from mlpmixer_flax.run_weights import default_checkpoint, describe_weights, open_run, read_weights
from mlpmixer_flax.rundir import read_class_names, read_config, saved_steps, write_run
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.step import TrainState

PLACE = sharding.replicated(sharding.make_mesh())


def state(step):
    params = {"kernel": jnp.arange(6.0).reshape(2, 3) + step}
    momentum = {"trace": {"kernel": jnp.ones((2, 3))}}
    return jax.device_put(TrainState(jnp.int32(step), params, momentum, None), PLACE)


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
    like = sharding.with_placements(state(0), jax.tree.map(lambda x: x.sharding, state(0)))
    step, restored = checkpoints.restore(like)
    checkpoints.close()
    return step, restored


def test_the_newest_is_restored_exactly(tmp_path):
    save(tmp_path, {1: 0.5, 2: None})
    step, restored = restore(tmp_path)
    assert step == 2
    chex.assert_trees_all_equal(restored, state(2))
    assert restored.params["kernel"].sharding == PLACE


def test_without_checkpoints_the_step_is_0(tmp_path):
    assert restore(tmp_path) == (0, None)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.9, 3: None, 4: 0.3, 5: None, 6: 0.2})
    assert kept(tmp_path) == [2, 5, 6]
    reopened = Checkpoints(tmp_path, keep=2)
    assert reopened.best() == (2, (0.9, "test", "accuracy"))
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


@pytest.mark.parametrize("folder", [".", "default/d", "weights/d", "weights/ocdbt.process_0", "metrics"])
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
    chex.assert_trees_all_equal(params, jax.device_get(state(2).params))


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


def test_a_config_and_names_with_any_bytes_are_written_and_read_back(tmp_path):
    config = {"dataset": "folder:/photos/caf\udce9", "preprocess": {"mean": (0.5,)}}
    write_run(tmp_path, config, class_names=["cat", "châtaigne"])
    assert read_config(tmp_path) == {"dataset": "folder:/photos/caf\udce9", "preprocess": {"mean": [0.5]}}
    assert read_class_names(tmp_path) == ["cat", "châtaigne"]
    assert "châtaigne" in (tmp_path / "class_names.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot write to /proc/nothing"):
        write_run(Path("/proc/nothing/can/be/made/here"), config, class_names=[])


# --- which weights are read


def as_run(workdir, ema_decay, **others):
    write_run(
        workdir,
        {"model": {}, "preprocess": {}, "loss": "softmax", "ema_decay": ema_decay, **others},
        class_names=["cat"],
    )


@pytest.mark.parametrize("scored", ["test", "validation"])
def test_the_best_checkpoint_is_the_default_and_is_described(tmp_path, scored):
    as_run(tmp_path, 0.0)
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step, accuracy in {1: 0.9, 2: 0.5, 3: None}.items():
        checkpoints.save(step, state(step), accuracy and {f"{scored}/accuracy": accuracy})
    assert checkpoints.best() == (1, (0.9, scored, "accuracy"))
    checkpoints.close()
    assert default_checkpoint(tmp_path) == "best"
    assert open_run(tmp_path).step == open_run(tmp_path, "best").step == 1
    assert (open_run(tmp_path, "last").step, open_run(tmp_path, "2").step) == (3, 2)
    for which, step, text in [
        ("best", 1, f"step 1, the best checkpoint ({scored} accuracy 90.00%)"),
        ("last", 3, "step 3, the newest checkpoint"),
        ("2", 2, f"step 2 ({scored} accuracy 50.00%)"),
    ]:
        assert describe_weights(tmp_path, which, step=step) == text


@pytest.mark.parametrize(("ema_decay", "default"), [(0.0, "last"), (0.9, "ema")])
def test_without_scores_the_default_is_what_would_be_evaluated(tmp_path, ema_decay, default):
    as_run(tmp_path, ema_decay)
    save(tmp_path, {1: None, 2: None})
    assert default_checkpoint(tmp_path) == default
    with pytest.raises(UserError, match="has no checkpoint with a score: train first"):
        open_run(tmp_path, "best")


def test_the_best_checkpoint_may_be_that_of_another_score(tmp_path):
    as_run(tmp_path, 0.0, best_by="loss")
    losses = {1: 0.4, 2: 0.3, 3: float("nan"), 4: 0.35, 5: 0.5}
    checkpoints = Checkpoints(tmp_path, keep=1, best_by="loss")
    for step, loss in losses.items():
        checkpoints.save(step, state(step), {"test/loss": loss, "test/accuracy": step / 10})
    assert checkpoints.best() == (2, (0.3, "test", "loss"))
    checkpoints.close()
    assert kept(tmp_path) == [2, 5] and open_run(tmp_path).step == 2
    text = describe_weights(tmp_path, "best", step=2)
    assert text == "step 2, the best checkpoint (test loss 0.3000)"
    # The run continues with another score, which all its checkpoints have.
    as_run(tmp_path, 0.0, best_by="accuracy")
    again = Checkpoints(tmp_path, keep=1)
    assert again.best() == (5, (0.5, "test", "accuracy"))
    again.close()
    # Checkpoints without the score are not damaged, and can not be the best.
    as_run(tmp_path, 0.0, best_by="balanced_accuracy")
    again = Checkpoints(tmp_path, keep=1, best_by="balanced_accuracy")
    assert again.best() is None and default_checkpoint(tmp_path) == "last"
    again.save(6, state(6), {"test/balanced_accuracy": 0.1})
    again.save(7, state(7), {"test/balanced_accuracy": 0.05})
    assert again.best() == (6, (0.1, "test", "balanced_accuracy"))
    again.close()
    assert kept(tmp_path) == [6, 7]


def test_an_ema_is_described(tmp_path):
    as_run(tmp_path, 0.9)
    save(tmp_path, {1: 0.5})
    assert describe_weights(tmp_path, "best", step=1).endswith("(test accuracy 50.00%), EMA weights")
    assert describe_weights(tmp_path, "ema", step=1) == (
        "step 1, the newest checkpoint (test accuracy 50.00%), EMA weights"
    )
    assert describe_weights(tmp_path, "last", step=1) == "step 1, the newest checkpoint, without EMA"


def test_runs_of_both_names_of_scores_have_one_best(tmp_path):
    """A run that began before validation scores had their name continues with the new name."""
    as_run(tmp_path, 0.0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), {"test/accuracy": 0.9})
    checkpoints.save(2, state(2), {"validation/accuracy": 0.8})
    checkpoints.save(3, state(3), {"validation/accuracy": 0.7})
    checkpoints.close()
    assert kept(tmp_path) == [1, 3] and open_run(tmp_path).step == 1


def test_a_checkpoint_that_training_removes_meanwhile_is_not_an_error(tmp_path, monkeypatch):
    as_run(tmp_path, 0.0)
    save(tmp_path, {1: 0.5, 2: 0.6})
    find = run_weights._find_step
    found = []

    def find_and_lose(workdir, which):
        found.append(find(workdir, which))
        if len(found) == 1:  # a better one was saved, so that this one goes
            shutil.rmtree(workdir / "checkpoints" / str(found[0]))
        return found[-1]

    monkeypatch.setattr(run_weights, "_find_step", find_and_lose)
    assert read_weights(tmp_path, "best")[0] == 1 and found == [2, 1]


@pytest.mark.parametrize("content", ["", "[]", "null", '{"test/accuracy": "high"}', "\0\0", '{"loss": 1}'])
def test_a_run_continues_if_metrics_of_a_checkpoint_are_damaged(tmp_path, content):
    save(tmp_path, {1: 0.9, 2: 0.5})
    for file in files_with_content(tmp_path / "checkpoints" / "1" / "metrics"):
        file.write_text(content)
    assert read_weights(tmp_path, "best")[0] == 2
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.best() == (2, (0.5, "test", "accuracy"))
    checkpoints.save(3, state(3), scores(0.4))
    checkpoints.close()
    assert kept(tmp_path) == [2, 3]


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "nothing"])
def test_class_names_that_are_no_list_of_names_are_refused(tmp_path, content):
    (tmp_path / "class_names.json").write_text(content)
    with pytest.raises(UserError, match="class_names.json cannot be read .* is incomplete; choose another"):
        read_class_names(tmp_path)


@pytest.mark.parametrize("part", ["weights", "default", "metrics"])
def test_a_flipped_bit_is_found_in_every_file(tmp_path, capsys, part):
    save(tmp_path / "run", {1: 0.5, 2: 0.9})
    random = np.random.default_rng(0)
    files = files_with_content(tmp_path / "run" / "checkpoints" / "2" / part)
    assert len(files) >= (1 if part == "metrics" else 2)  # Orbax 0.12.0 writes one file of metrics
    for file in files:
        data = bytearray(file.read_bytes())
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        (tmp_path / "copy" / file.relative_to(tmp_path / "run")).write_bytes(data)
        if part == "metrics":  # the state is whole, but not known to be the best one
            assert read_weights(tmp_path / "copy", "best")[0] == 1
            assert restore(tmp_path / "copy")[0] == 2
        else:
            if part == "default":  # the weights are whole
                step, params = read_weights(tmp_path / "copy", "best")
                assert step == 2
                chex.assert_trees_all_equal(params, jax.device_get(state(2).params))
            else:
                name = re.escape(str(file.relative_to(tmp_path / "run" / "checkpoints" / "2")))
                with pytest.raises(
                    UserError, match=f"checkpoint 2 in .* cannot be read .*{name} is not as it was"
                ):
                    read_weights(tmp_path / "copy", "best")
            step, restored = restore(tmp_path / "copy")
            assert step == 1
            chex.assert_trees_all_equal(restored, state(1))
            assert "is not as it was saved" in capsys.readouterr().out
        shutil.rmtree(tmp_path / "copy")


def test_a_checkpoint_without_checksums_is_read_with_a_note(tmp_path, capsys):
    save(tmp_path, {1: 0.5})
    (tmp_path / "checkpoints" / "1" / "xxh3_128.json").unlink()
    assert read_weights(tmp_path, "best")[0] == 1
    assert capsys.readouterr().err.startswith("checkpoint 1 has no checksums")
    assert restore(tmp_path)[0] == 1
    assert capsys.readouterr().out.startswith("checkpoint 1 has no checksums")


@pytest.mark.parametrize("damaged", [False, True])
def test_checkpoints_of_earlier_versions_are_read_and_checked(tmp_path, damaged):
    """They have one item with the whole state, and SHA-256 checksums, or none."""
    as_run(tmp_path, 0.9)
    folder = tmp_path / "checkpoints"
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            whole = state(step).replace(ema={"kernel": jnp.full((2, 3), 7.0)})
            manager.save(step, args=ocp.args.StandardSave(whole))
    files = sorted(
        file for file in (folder / "2").rglob("*") if file.is_file() and file.parent != folder / "2"
    )
    digests = {
        file.relative_to(folder / "2").as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    (folder / "2" / "sha256.json").write_text(json.dumps(digests))
    if damaged:
        files[-1].write_bytes(files[-1].read_bytes() + b"\0")
        with pytest.raises(UserError, match="checkpoint 2 in .* cannot be read .* is not as it was saved"):
            read_weights(tmp_path, "ema")
    else:
        assert read_weights(tmp_path, "ema")[1]["kernel"].tolist() == [[7.0] * 3] * 2
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        step, restored = checkpoints.restore(jax.eval_shape(lambda: whole))
        chex.assert_trees_all_equal(restored, whole.replace(step=jnp.int32(step), params=state(step).params))
        checkpoints.save(3, whole, None)  # the run continues beside them
    assert step == (1 if damaged else 2)
    assert read_weights(tmp_path, "ema")[0] == 3


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"default/_METADATA": 3, "weights/_METADATA": 3}', "5"])
def test_damaged_checksums_count_as_damage(tmp_path, content):
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "checkpoints" / "2" / "xxh3_128.json").write_text(content)
    with pytest.raises(UserError, match="checkpoint 2 in .* cannot be read"):
        read_weights(tmp_path)
    assert restore(tmp_path)[0] == 1


def test_weights_that_are_not_finite_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    tree = jax.device_get(state(1))
    tree.params["kernel"] = tree.params["kernel"] * np.float32("nan")
    checkpoints.save(1, jax.device_put(tree, PLACE), None)
    checkpoints.close()
    with pytest.raises(UserError, match="step 1 have values that are not finite"):
        read_weights(tmp_path)


@pytest.mark.parametrize("accuracy", [10**400, True, float("nan"), -0.5, "0.5", None])
def test_what_is_no_share_of_images_is_no_accuracy(accuracy):
    assert run_weights.score_of({"test/accuracy": accuracy}) is None


def test_names_that_no_file_can_have_are_missing_files(tmp_path):
    (tmp_path / "xxh3_128.json").write_text(json.dumps({"default/" + "x" * 3000: "ab"}))
    with pytest.raises(ValueError, match="is not as it was saved"):
        check_files(tmp_path, "default")


@pytest.mark.parametrize("name", ["9/", "9", "007/", "007", "99999999999999999999/", "٣/"])
def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path, name):
    save(tmp_path, {1: None, 2: None})
    other = tmp_path / "checkpoints" / name
    other.mkdir() if name.endswith("/") else other.touch()
    assert saved_steps(tmp_path) == [1, 2]
    assert read_weights(tmp_path)[0] == 2
    assert restore(tmp_path)[0] == 2


# Orbax or TensorStore opens each of these, and would wait for ever.
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "weights/manifest.ocdbt", "default/_METADATA"])
def test_a_pipe_in_a_checkpoint_is_named_and_not_opened(tmp_path, name):
    save(tmp_path, {1: None, 2: None})
    folder = tmp_path / "checkpoints" / "2"
    (folder / "xxh3_128.json").unlink()  # otherwise the checksum of some of them is missing
    (folder / name).unlink()
    os.mkfifo(folder / name)
    (folder / "weights" / "back").symlink_to(folder)  # is no endless folder
    for use in (read_weights, restore):
        with pytest.raises(UserError, match=f"checkpoints/2/{name}' is a named pipe: give a regular file"):
            use(tmp_path)
