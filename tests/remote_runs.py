"""Runs in a remote run directory, in processes of their own."""

import subprocess
import sys
import time

from mlpmixer_flax.remote import connect, list_files
from mlpmixer_flax.rundir import MARKER, files_of_run

CHANGES = {
    "model.hidden_dim": 8,
    "model.num_blocks": 1,
    "model.channels_mlp_dim": 8,
    "augment.mixup_alpha": 0.0,
}
CHANGES |= {"log_every_steps": 5, "eval_every_steps": 10, "save_every_steps": 10, "schedule.name": "constant"}
TRAIN = """
import sys
from mlpmixer_flax.train import main
from mlpmixer_flax.training import mirror, remote_lock
mirror.UPLOAD_SECONDS, remote_lock.RENEW_SECONDS = float(sys.argv[1]), 0.5
sys.exit(main(sys.argv[2:]))
"""


def arguments(workdir, **changes):
    options = [f"--config.{key}={value}" for key, value in {**CHANGES, **changes}.items()]
    return ["--config=digits.py", f"--workdir={workdir}", *options]


def start(workdir, *, upload_seconds=0.2, **changes):
    """Starts a run in another process, which prints to a pipe."""
    command = [sys.executable, "-u", "-c", TRAIN, str(upload_seconds), *arguments(workdir, **changes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[0]
        time.sleep(0.02)


def complete(url):
    """Returns the steps of the checkpoints that are complete at a remote path."""
    names = files_of_run(list_files(*connect(url)).keys())
    return sorted(int(name.split("/")[1]) for name in names if name.endswith(f"/{MARKER}"))
