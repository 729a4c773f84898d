"""Ctrl-C at any moment ends a program at once, with status 130 and without a traceback."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty_machine import QUICK_TO_COMPILE, start_training

# Training of a model whose state takes half a second to save.
LARGE = ["--config=digits.py", "--config.model.hidden_dim=768", "--config.model.channels_mlp_dim=3072"]
LARGE += ["--config.model.num_blocks=6", "--config.batch_size=2", "--config.augment.mixup_alpha=0"]
LARGE += ["--config.save_every_steps=3", "--config.log_every_steps=1", "--config.eval_every_epochs=30"]
STOPPED = "stopped at once; the run can continue from its newest checkpoint, if it has one\n"


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def start(*arguments):
    """Starts a module of the package, or a program of benchmarks/."""
    as_module = [] if arguments[0].endswith(".py") else ["-m"]
    return subprocess.Popen(
        [sys.executable, "-u", *as_module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=QUICK_TO_COMPILE,
    )


def end_of(process):
    """Sends the signal of Ctrl-C; returns the status as a shell sees it, the rest of the output and the seconds."""
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    status = process.returncode
    return (128 - status if status < 0 else status), out, time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "program",
    [
        ["mlpmixer_flax.train", "photos/"],
        ["mlpmixer_flax", "predict", "a.png"],
        *(
            [f"{BENCHMARKS}/{name}.py", "--help"]
            for name in ("reproduce", "levers", "flexible", "run_shares")
        ),
    ],
    ids=lambda program: Path(program[0]).name,
)
def test_while_a_program_is_imported(program):
    process = start(*program)
    # NumPy is one of the first packages of a second or two.
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    assert end_of(process)[:2] == (130, "")


@pytest.mark.slow
def test_while_training_is_compiled(tmp_path):
    process = start("mlpmixer_flax", "train", "--config=digits.py", f"--workdir={tmp_path}/run")
    for line in process.stdout:
        if "steps (" in line:
            break
    time.sleep(0.3)
    status, out, seconds = end_of(process)
    assert status == 130 and out.endswith(STOPPED) and "Traceback" not in out and "ignored" not in out
    assert seconds < 5


def test_where_it_is_ignored_it_stays_so():
    """As in a background process of a script."""
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-m", "mlpmixer_flax.summary"]
    command.append("--config=digits.py")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(0.8)
    status, out, _ = end_of(process)
    assert status == 0 and "parameters" in out


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_a_second_time_while_the_run_is_saved(tmp_path, seconds):
    arguments = [*LARGE, f"--workdir={tmp_path}/run"]
    process = start_training(*arguments, until="step 4/")
    process.send_signal(signal.SIGINT)
    time.sleep(seconds)
    status, out, took = end_of(process)
    assert status == 130 and "Traceback" not in out and "ignored" not in out, out
    assert took < 10
    saved = max(map(int, filter(str.isdigit, os.listdir(tmp_path / "run" / "checkpoints"))))
    process = start("mlpmixer_flax.train", *arguments)
    for line in process.stdout:
        if found := re.search(r"continuing from step (\d+)", line):
            break
    process.kill()
    process.communicate()
    assert int(found[1]) == saved >= 3
    shutil.rmtree(tmp_path / "run")  # hundreds of MB
