"""Damaged checkpoints are never taken for others, and a run continues from one that is whole."""

import json
import os
import re
import shutil

import chex
import jax
import numpy as np
import pytest
from small_checkpoints import PLACE, files_with_content, kept, restore, save, scores, state

from mlpmixer_flax import UserError
from mlpmixer_flax.checksums import check_files
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.training.checkpoints import Checkpoints


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


def test_if_no_checkpoint_can_be_read_the_run_is_refused_and_nothing_is_moved(tmp_path, capsys):
    save(tmp_path, {1: None})
    for file in files_with_content(tmp_path / "checkpoints" / "1"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match="none of the checkpoints 1 in .* can be read: choose another --workdir"
    ):
        restore(tmp_path)
    assert kept(tmp_path) == [1]
    out = capsys.readouterr().out
    assert "checkpoint 1 cannot be read: " in out and "trying" not in out


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


def test_names_that_no_file_can_have_are_missing_files(tmp_path):
    (tmp_path / "xxh3_128.json").write_text(json.dumps({"default/" + "x" * 3000: "ab"}))
    with pytest.raises(ValueError, match="is not as it was saved"):
        check_files(tmp_path, "default")


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
