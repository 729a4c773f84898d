"""Tests what happens to a run if the disk fails: one sentence, checkpoints that stay, and the same bits afterwards."""

import concurrent.futures
import contextlib
import os
import re
import shutil
import sys
import time

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from faulty_machine import (
    fill,
    run,
    small_disk,
    start_training,
    with_small_files,
    without_rights,
)

from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.advice import advising, why_cpu
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.report import Reporter
from mlpmixer_flax.training.step import TrainState

# The rest of a save that has failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
PLACE = sharding.replicated(sharding.make_mesh())


def state(step):
    whole = TrainState(jnp.int32(step), {"kernel": jnp.arange(50_000.0) + step}, (), None)
    return jax.device_put(whole, PLACE)


def restore(workdir):
    with contextlib.closing(Checkpoints(workdir, keep=100)) as checkpoints:
        like = jax.eval_shape(lambda: state(0))
        return checkpoints.restore(sharding.with_placements(like, jax.tree.map(lambda _: PLACE, like)))


def names(workdir):
    return sorted(os.listdir(workdir / "checkpoints"))


def test_a_save_on_a_full_disk_is_an_error_of_the_system_and_leaves_only_whole_checkpoints(tmp_path):
    with small_disk(tmp_path / "disk", 1500) as disk:
        with (
            pytest.raises(OSError, match="No space left on device: .*/checkpoints'"),
            contextlib.closing(Checkpoints(disk, keep=100)) as checkpoints,
        ):
            for step in range(100):
                checkpoints.save(step, state(step), {"test/accuracy": 0.5})
        saved = names(disk)
        assert 2 <= len(saved) < 20 and saved == [str(step) for step in range(len(saved))]
        step, restored = restore(disk)
        assert step == len(saved) - 1
        chex.assert_trees_all_equal(restored, state(step))
        shutil.rmtree(disk / "checkpoints" / "0")
        with contextlib.closing(Checkpoints(disk, keep=100)) as checkpoints:
            checkpoints.save(step + 1, state(step + 1), None)  # there is room again
        assert restore(disk)[0] == step + 1


def test_a_deleted_run_is_noticed_and_not_created_again(tmp_path):
    workdir = tmp_path / "run"
    with (
        pytest.raises(FileNotFoundError, match="No such file or directory: .*/run/checkpoints'"),
        contextlib.closing(Checkpoints(workdir, keep=2)) as checkpoints,
    ):
        checkpoints.save(1, state(1), None)
        assert checkpoints.best() is None
        shutil.rmtree(workdir)
        workdir.mkdir()  # somebody else begins another run there
        checkpoints.save(2, state(2), None)
    assert list(workdir.parent.rglob("*")) == []


def test_a_run_that_is_deleted_while_it_saves_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    checkpoints.save(1, state(1), None)
    while (tmp_path / "run").exists():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(FileNotFoundError, match="/run/checkpoints'"):
        checkpoints.close()
    assert not (tmp_path / "run").exists()


def test_what_other_threads_of_a_failed_save_write_late_is_removed_too(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    until = time.monotonic() + 0.5

    def write():  # as TensorStore does, which creates missing folders again
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                folder = tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp" / "d"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "array").write_bytes(b"values")
            time.sleep(0.01)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        while not names(tmp_path / "run"):
            time.sleep(0.01)
        checkpoints.close()
        writing.result()
    assert names(tmp_path / "run") == []


@pytest.mark.parametrize("leave_kb", [0, 3])
def test_a_report_on_a_full_disk_is_an_error_of_the_system_and_does_not_wait_for_ever(tmp_path, leave_kb):
    with small_disk(tmp_path / "disk", 200) as disk:
        reporter = Reporter(disk, start_step=0, total_steps=10**6, steps_per_epoch=10.0)
        fill(disk, leave_kb=leave_kb)
        with pytest.raises(OSError, match="No space left on device: '.*disk"):
            for step in range(10**5):
                reporter.evaluation(step, {"test/loss": 1.0, "test/accuracy": 0.5})
        with contextlib.suppress(OSError):
            reporter.close()


def test_tensorboard_on_a_full_disk_is_an_error_of_the_system(tmp_path):
    with small_disk(tmp_path / "disk", 200) as disk:
        reporter = Reporter(disk, start_step=0, total_steps=10**6, steps_per_epoch=10.0)
        fill(disk)
        with pytest.raises(OSError, match=f"No space left on device: '{disk}'"):
            for step in range(10**5):
                reporter.by_class(step, {"cat": 0.5}, tag="test_class_accuracy")
        with contextlib.suppress(OSError):
            reporter.close()


def test_advice_says_what_needs_less_memory_and_what_is_saved(tmp_path):
    (tmp_path / "checkpoints" / "20" / "default").mkdir(parents=True)
    for error, notes in {
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"): [
            "accumulation_steps.*#out-of-memory",
            "up to step 20",
        ],
        MemoryError(): ["cache_bytes and fewer num_workers", "up to step 20"],
        OSError(28, "No space left on device", "a"): [
            f"up to step 20 are whole, .*--workdir={tmp_path} continues"
        ],
        ValueError("a bug"): [],
    }.items():
        with pytest.raises(type(error)), advising(tmp_path):
            raise error
        found = getattr(error, "__notes__", [])
        assert len(found) == len(notes)
        assert all(re.search(note, line) for note, line in zip(notes, found, strict=True))


def test_a_gpu_that_cannot_be_used_is_not_called_missing(tmp_path):
    (tmp_path / "nvidia0").touch()
    assert why_cpu([str(tmp_path / "nvidia0")]).startswith(
        "this machine has an NVIDIA GPU, but JAX cannot use it"
    )
    assert why_cpu([str(tmp_path / "nvidia1")]) == "no GPU found, using the CPU"


# --- whole runs

SMALL = {
    "model.hidden_dim": 32,
    "model.channels_mlp_dim": 32,
    "model.num_blocks": 1,
    "model.dropout_rate": 0.1,
    "augment.mixup_alpha": 0.0,  # otherwise compiling takes seconds
    "ema_decay": 0.9,
    "total_steps": 30,
    "eval_every_steps": 10,
    "save_every_steps": 2,
    "log_every_steps": 2,
    "keep_checkpoints": 100,
}


def options(workdir, **changes):
    values = SMALL | changes
    return [
        "--config=digits.py",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def last_state(workdir):
    newest = max((workdir / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    with ocp.StandardCheckpointer() as checkpointer:
        parts = [checkpointer.restore((newest / part).absolute()) for part in ("default", "weights")]
    return parts[0] | parts[1]


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_fills_the_disk_ends_with_one_sentence_and_later_with_the_same_bits(tmp_path):
    assert run("train", *options(tmp_path / "whole"))[0] == 0
    with small_disk(tmp_path / "disk", 2000) as disk:
        workdir = disk / "run"
        for _ in range(2):  # the second time, the disk is nearly full from the start
            status, err = run("train", *options(workdir))
            sentence = re.fullmatch(
                r"error: no space is left on the disk \(.*\): make room there; the checkpoints up to step (\d+) are "
                r"whole, and the same command with --workdir=.* continues from there\n",
                err,
            )
            assert status == 1 and sentence, err
            assert names(workdir)[-1].isdigit() and max(map(int, names(workdir))) == int(sentence[1])
            assert not list(disk.rglob("*tmp*"))
        shutil.copytree(workdir, tmp_path / "run")
    assert run("train", *options(tmp_path / "run"))[0] == 0
    chex.assert_trees_all_equal(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_that_may_not_write_more_ends_with_one_sentence(tmp_path):
    workdir = tmp_path / "run"
    # Compiled programs are larger than the files that are allowed.
    env = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    status, err = run("train", *options(workdir), env=env, lacking=with_small_files)
    assert status == 1
    assert re.fullmatch(
        r"error: the system allows no larger file \(.*run(/checkpoints)?\): raise the limit .*\n", err
    ), err
    assert names(workdir) == []


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_is_deleted_ends_with_one_sentence(tmp_path):
    workdir = tmp_path / "run"
    process = start_training(*options(workdir, total_steps=100_000), until="step 20/")
    while workdir.exists():
        shutil.rmtree(workdir, ignore_errors=True)
    *_, last = process.stdout
    assert process.wait() == 1
    assert last == f"error: {workdir}/checkpoints does not exist any more: restore it, or begin again\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes a right from root as Linux does")
@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/10", "checkpoints/10/weights/d", "data.json"])
def test_a_run_that_may_not_be_read_is_not_called_damaged(digits_run, tmp_path, place):
    workdir = shutil.copytree(digits_run, tmp_path / "run")
    for step in (20, 30, 40):  # so that 10 is the newest
        shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / place).chmod(0)
    arguments = {"model.hidden_dim": 16, "model.channels_mlp_dim": 16, "model.num_blocks": 2}
    arguments |= {"augment.mixup_alpha": 0.0, "ema_decay": 0.9, "optimizer.learning_rate": 0.01}
    arguments |= {"schedule.name": "constant", "total_steps": 50}
    command = [
        "--config=digits.py",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in arguments.items()),
    ]
    status, err = run("train", *command, lacking=without_rights)
    (workdir / place).chmod(0o755)
    assert status == 2
    assert re.fullmatch(
        rf"error: you have no permission \({workdir}/{place.partition('/default')[0]}.*\): .*\n", err
    ), err
    assert not (workdir / "damaged").exists()
