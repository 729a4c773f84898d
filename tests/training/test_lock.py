"""Tests that a run directory is used by one process at a time, with real processes."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.run_weights import open_run
from mlpmixer_flax.rundir import saved_steps
from mlpmixer_flax.train import main
from mlpmixer_flax.training.lock import RunLock
from mlpmixer_flax.training.mirror import mirrored

ARGUMENTS = ["--config=digits.py", "--config.model.hidden_dim=8", "--config.model.num_blocks=1"]
ARGUMENTS += ["--config.augment.mixup_alpha=0", "--config.total_steps=1000000", "--config.log_every_steps=5"]
ARGUMENTS += ["--config.eval_every_steps=1000000", "--config.save_every_steps=50"]


def start(workdir, *arguments, **options):
    command = [
        sys.executable,
        "-u",
        "-m",
        "mlpmixer_flax.train",
        *ARGUMENTS,
        f"--workdir={workdir}",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for(process, pattern):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError("".join(lines))


def run_in_this_process(workdir):
    return main([*ARGUMENTS, f"--workdir={workdir}"])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_second_start_is_refused_and_a_killed_run_blocks_nothing(tmp_path, capsys, workers):
    workdir = tmp_path / "run"
    first = start(workdir, f"--config.num_workers={workers}", "--config.cache_bytes=0")
    try:
        wait_for(first, r"^step 60/")
        before = {
            file: file.stat().st_mtime_ns for file in workdir.glob("*.js*") if file.name != "metrics.jsonl"
        }
        assert run_in_this_process(workdir) == 2
        captured = capsys.readouterr()
        assert captured.err == (
            f"error: {workdir} is in use by process {first.pid} on {socket.gethostname()}: wait until it ends, or "
            "choose another --workdir\n"
        )
        assert captured.out == ""
        after = {
            file: file.stat().st_mtime_ns for file in workdir.glob("*.js*") if file.name != "metrics.jsonl"
        }
        assert after == before
        end = time.monotonic() + 60
        while not saved_steps(workdir) and time.monotonic() < end:
            time.sleep(0.1)
        assert open_run(workdir).step >= 50  # a reader needs no lock
    finally:
        first.kill()
        first.communicate()
    assert (workdir / "in_use.json").exists()  # left behind, and blocks nothing
    second = start(workdir, f"--config.num_workers={workers}", "--config.cache_bytes=0")
    try:
        wait_for(second, r"^continuing from step ")
        assert json.loads((workdir / "in_use.json").read_text())["process"] == second.pid
        wait_for(second, r"^step \d+")
        second.send_signal(signal.SIGTERM)
        second.communicate()
    finally:
        second.kill()
    assert second.returncode == 128 + signal.SIGTERM
    assert not (workdir / "in_use.json").exists()


@pytest.mark.long
def test_two_starts_at_the_same_time_leave_one(tmp_path):
    both = [start(tmp_path / "run") for _ in range(2)]
    try:
        end = time.monotonic() + 120
        while all(process.poll() is None for process in both) and time.monotonic() < end:
            time.sleep(0.1)
        (refused,) = [process for process in both if process.poll() is not None]
        (going,) = [process for process in both if process.poll() is None]
        assert refused.returncode == 2
        assert re.search(r"^error: .*(is in use by|has begun a run)", refused.stdout.read(), re.MULTILINE)
        wait_for(going, r"^step 10/")
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_lock_is_held_once_and_released(tmp_path):
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.check()
    assert not (tmp_path / "run").exists()  # a check writes nothing
    first.take()
    first.take()
    for method in (second.check, second.take):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            method()
    (tmp_path / "run" / "in_use.json").write_text("{")
    with pytest.raises(UserError, match="is in use by another process: wait"):
        second.take()
    first.close()
    first.close()
    second.check()
    with pytest.raises(UserError, match="is in use by process"):
        first.take()
    second.close()


def test_a_directory_in_which_nothing_can_be_locked_is_refused(tmp_path):
    (tmp_path / "in_use.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*in_use.lock \(.*\): choose another --workdir"):
        RunLock(Path(tmp_path)).take()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_refused(number, tmp_path, monkeypatch):
    """The kernel answers with one of these numbers."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    words = "" if number == errno.ENOSYS else "|.*is in use by another process"  # filelock before 3.21
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^(cannot lock .*: choose another --workdir{words})"):
            RunLock(tmp_path / "run").take()
        with (
            pytest.raises(UserError, match=rf"^(cannot lock .*: set MLPMIXER_CACHE to a directory{words})"),
            mirrored("memory://bucket/run"),
        ):
            raise AssertionError("it trains without a lock")
    assert not (tmp_path / "run" / "in_use.json").exists()
