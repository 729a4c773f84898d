"""Training that is killed or gets a signal, in real processes, and continues."""

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import chex
import pytest
from small_runs import last_state, read_until, rows, start_process
from written_events import events

from mlpmixer_flax.run_weights import default_checkpoint, describe_weights

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    arguments = ["--config.total_steps=120", "--config.save_every_steps=7", "--config.eval_every_steps=45"]
    whole = start_process(tmp_path / "whole", *arguments)
    out = whole.stdout.read()
    assert whole.wait() == 0, out

    rng = random.Random()
    moment = rng.randrange(20, 100, 10)  # a line is printed every 10 steps
    print(f"killed while starting and after step {moment}")
    for pattern in ["of 64 images on", rf"^step {moment}/120"]:
        process = start_process(tmp_path / "killed", *arguments)
        read_until(process, pattern)
        time.sleep(rng.uniform(0, 0.03))  # a step takes some milliseconds
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start_process(tmp_path / "killed", *arguments)
    out = process.stdout.read()
    assert process.wait() == 0, out
    assert int(re.search(r"continuing from step (\d+)", out)[1]) >= moment - 20
    chex.assert_trees_all_equal(last_state(tmp_path / "killed"), last_state(tmp_path / "whole"))
    # Every row of metrics.jsonl is the same too, and is there once; only the speed is another.
    logged = [rows(tmp_path / run) for run in ("whole", "killed")]
    for row in [row for run in logged for row in run if "train/loss" in row]:
        assert row.pop("images_per_second") > 0 and 0 <= row.pop("data_wait") <= 1
    assert logged[0] == logged[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_makes_the_run_save_and_the_same_command_continues(tmp_path, number):
    workdir = tmp_path / "run"
    arguments = ["--config.total_steps=100000", "--config.save_every_steps=100000"]
    process = start_process(workdir, *arguments, "--config.eval_every_steps=100000")
    read_until(process, r"^step \d+/100000")
    process.send_signal(number)
    out = process.stdout.read()
    assert process.wait() == 128 + number
    name = signal.Signals(number).name
    step = int(re.search(rf"{name}: saved step (\d+); the same command with --workdir=", out)[1])
    assert int(last_state(workdir)["step"]) == step > 0
    assert "Traceback" not in out

    process = start_process(workdir, *arguments, "--config.eval_every_steps=100000")
    lines = read_until(process, r"^step \d+/100000")
    process.send_signal(number)
    process.communicate()
    assert any(f"continuing from step {step} " in line for line in lines)
    tags = [value.tag for event in events(workdir) for value in event.summary.value]
    assert tags.count("config/text_summary") == tags.count("training_images") == 1


@pytest.mark.long
@pytest.mark.slow
def test_signals_that_are_ignored_already_stay_ignored(tmp_path):
    """As SIGHUP after `nohup`, and SIGINT of a background process that a script has started."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]  # a new process inherits it
    try:
        process = start_process(tmp_path / "run", "--config.total_steps=60")
    finally:
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)
    read_until(process, r"^step \d+/60")
    for number in ignored:
        process.send_signal(number)
    out = process.stdout.read()
    assert process.wait() == 0 and "stopping" not in out and "done: test accuracy" in out


@pytest.mark.long
@pytest.mark.slow
def test_a_signal_during_an_evaluation_saves_at_once_and_the_evaluation_is_made_up_for(tmp_path):
    arguments = ["--config.total_steps=2", "--config.test_split=train", "--config.model.num_blocks=8"]
    arguments += ["--config.model.hidden_dim=256", "--config.model.channels_mlp_dim=1024"]
    process = start_process(tmp_path / "run", *arguments)
    read_until(process, "in the first update")
    time.sleep(1)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM, out
    assert time.monotonic() - start < 10
    assert "SIGTERM: saved step 2;" in out and "validation accuracy" not in out
    assert [row for row in rows(tmp_path / "run") if "validation/accuracy" in row] == []

    # In the evaluation that is made up for, a signal ends the run as well.
    process = start_process(tmp_path / "run", *arguments)
    read_until(process, "compiled in")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM and "Traceback" not in out, out
    assert "SIGTERM: saved step 2;" in out

    process = start_process(tmp_path / "run", *arguments)
    out = process.stdout.read()
    assert process.wait() == 0 and "best: " in out, out
    (row,) = [row for row in rows(tmp_path / "run") if "validation/accuracy" in row]
    assert row["step"] == 2
    text = f"step 2, the best checkpoint (validation accuracy {row['validation/accuracy']:.2%})"
    assert describe_weights(tmp_path / "run", default_checkpoint(tmp_path / "run"), step=2).startswith(text)


STREAMED = ["--config.cache_bytes=0", "--config.num_workers=2", "--config.total_steps=100000"]


STREAMED += ["--config.eval_every_steps=20", "--config.save_every_steps=100000"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT])
def test_the_run_also_saves_if_its_workers_get_the_signal(tmp_path, number):
    """Ctrl-C in a terminal and a cluster's SIGTERM go to the whole process group."""
    process = start_process(tmp_path / "run", *STREAMED, start_new_session=True)
    read_until(process, r"^step \d+/100000")
    os.killpg(process.pid, number)
    out = process.stdout.read()
    assert process.wait() == 128 + number, out
    step = int(re.search(r": saved step (\d+)", out)[1])
    assert int(last_state(tmp_path / "run")["step"]) == step > 0
    assert "Traceback" not in out


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the process group from Linux's /proc")
def test_workers_of_a_killed_run_end(tmp_path):
    process = start_process(tmp_path / "run", *STREAMED, start_new_session=True)
    read_until(process, r"^step \d+/100000")

    def alive():
        stats = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process ended after it was listed
                stats.append(file.read_text().rpartition(")")[2].split())
        return sum(int(group) == process.pid and state != "Z" for state, _, group, *_ in stats)

    assert alive() >= 3
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while alive() and time.monotonic() < end:
        time.sleep(0.2)
    assert alive() == 0
