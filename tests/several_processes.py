"""Starts several processes of a program that find each other on this machine, and compares what they save."""

import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

# The model of `digits_run`, with everything that could differ between processes; mixup would take long to compile.
CHANGES = {
    "model.hidden_dim": 16,
    "model.channels_mlp_dim": 16,
    "model.num_blocks": 2,
    "model.dropout_rate": 0.1,
    "augment.mixup_alpha": 0.0,
    "augment.crop_padding_px": 1,
    "ema_decay": 0.9,
    "accumulation_steps": 2,
    "optimizer.sam_rho": 0.02,
    # Not Adam: some biases have no gradient but rounding, because of LayerNorm, and Adam makes full updates of it.
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.03,
    "log_every_steps": 1,
    "eval_every_steps": 20,
    "save_every_steps": 20,
    "keep_checkpoints": 20,
    "schedule.name": "constant",  # so that the length of a run changes no update
}
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def arguments(changes):
    return ["--config=digits.py", *(f"--config.{key}={value}" for key, value in changes.items())]


def start_all(count, program, *options, folders=None, environment=None):
    """Starts `count` processes of a program that find each other by --distributed, or else by `environment`(i)."""
    at, processes = f"127.0.0.1:{free_port()}", []
    for index in range(count):
        command = [sys.executable, "-u", "-m", f"mlpmixer_flax.{program}", *map(str, options)]
        if environment is None:
            command.append(f"--distributed={at},{count},{index}")
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folders and folders[index],
                env=os.environ | ENVIRONMENT | (environment(index) if environment else {}),
            )
        )
    return processes


def finish(processes, timeout=240):
    """Waits for all; returns their exit statuses, and what each printed without the lines of Gloo itself."""
    try:
        ends = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE) for out, _ in ends]
    return [process.returncode for process in processes], texts, [error for _, error in ends]


def read_until(process, pattern):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError(f"{''.join(lines)}\n{process.stderr.read()}")


def state_at(workdir, step):
    """Returns the arrays of a checkpoint by name, whatever devices they were on."""
    found = []
    for part in ("default", "weights"):
        folder = (workdir / "checkpoints" / str(step) / part).absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            found.append(checkpointer.restore(folder, args=ocp.args.PyTreeRestore(stored, as_numpy)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(found)}
