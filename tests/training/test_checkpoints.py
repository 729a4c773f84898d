"""Tests what a run keeps on disk and restores exactly, and which of its weights are read."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from small_checkpoints import PLACE, as_run, kept, restore, save, scores, state

from mlpmixer_flax import UserError, run_weights
from mlpmixer_flax.checksums import add_checksum
from mlpmixer_flax.run_weights import default_checkpoint, describe_weights, open_run, read_weights
from mlpmixer_flax.rundir import read_class_names, read_config, saved_steps, write_run
from mlpmixer_flax.training.checkpoints import Checkpoints


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


def test_scores_that_are_added_later_count_like_those_that_were_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1), scores(0.5))
    checkpoints.save(2, state(2), None)
    checkpoints.best()  # waits until both are on disk
    # As if a kill had come between the two files that this writes
    add_checksum(tmp_path / "checkpoints" / "2", "metrics/metrics", b"other scores")
    assert read_weights(tmp_path, "best")[0] == 1 and read_weights(tmp_path, "2")[0] == 2
    checkpoints.add_scores(2, scores(0.9))
    assert checkpoints.best() == (2, (0.9, "test", "accuracy"))
    for step in (3, 4):
        checkpoints.save(step, state(step), scores(0.1))
    checkpoints.close()
    assert kept(tmp_path) == [2, 4]
    step, params = read_weights(tmp_path, "best")
    assert step == 2
    chex.assert_trees_all_equal(params, jax.device_get(state(2).params))


def test_a_checkpoint_half_written_by_a_killed_run_is_ignored(tmp_path):
    save(tmp_path, {1: None})
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-1").mkdir()
    assert restore(tmp_path)[0] == 1


def test_class_names_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="class_names.json cannot be read .* is incomplete; choose another"):
        read_class_names(tmp_path)


def test_a_config_and_names_with_any_bytes_are_written_and_read_back(tmp_path):
    config = {"dataset": "folder:/photos/caf\udce9", "preprocess": {"mean": (0.5,)}}
    write_run(tmp_path, config, class_names=["cat", "châtaigne"])
    assert read_config(tmp_path) == {"dataset": "folder:/photos/caf\udce9", "preprocess": {"mean": [0.5]}}
    assert read_class_names(tmp_path) == ["cat", "châtaigne"]
    assert "châtaigne" in (tmp_path / "class_names.json").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot write to /proc/nothing"):
        write_run(Path("/proc/nothing/can/be/made/here"), config, class_names=[])


# --- which weights are read


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


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "nothing"])
def test_class_names_that_are_no_list_of_names_are_refused(tmp_path, content):
    (tmp_path / "class_names.json").write_text(content)
    with pytest.raises(UserError, match="class_names.json cannot be read .* is incomplete; choose another"):
        read_class_names(tmp_path)


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


@pytest.mark.parametrize("accuracy", [10**400, True, float("nan"), -0.5, "0.5", None])
def test_what_is_no_share_of_images_is_no_accuracy(accuracy):
    assert run_weights.score_of({"test/accuracy": accuracy}) is None


@pytest.mark.parametrize("name", ["9/", "9", "007/", "007", "99999999999999999999/", "٣/"])
def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path, name):
    save(tmp_path, {1: None, 2: None})
    other = tmp_path / "checkpoints" / name
    other.mkdir() if name.endswith("/") else other.touch()
    assert saved_steps(tmp_path) == [1, 2]
    assert read_weights(tmp_path)[0] == 2
    assert restore(tmp_path)[0] == 2
