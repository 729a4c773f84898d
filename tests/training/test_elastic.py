"""Tests runs whose devices change: all bits stay the same with `reproducible`, and `mesh.fsdp` may change.

Each start is a process of its own, because JAX counts its devices once.
"""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mlpmixer_flax.training.report import read_metrics

pytestmark = pytest.mark.slow

# Odd sizes, so that the last part of every loop over numbers is another one. Everything that changes an update is on.
REPRODUCIBLE = {
    "reproducible": 8,
    "batch_size": 32,
    "accumulation_steps": 2,
    "model.hidden_dim": 37,
    "model.tokens_mlp_dim": 13,
    "model.channels_mlp_dim": 26,
    "model.num_blocks": 1,
    "model.dropout_rate": 0.1,
    "model.stochastic_depth_rate": 0.1,
    "augment.crop_padding_px": 1,
    "augment.mixup_alpha": 0.0,  # slow to compile
    "augment.cutmix_alpha": 0.0,
    "optimizer.sam_rho": 0.05,
    "optimizer.weight_decay": 0.1,
    "freeze": "stem",
    "ema_decay": 0.9,
    "total_steps": 30,
    "log_every_steps": 1,
    "eval_every_steps": 15,
    "save_every_steps": 3,
    "keep_checkpoints": 20,
}


def start(*command, devices=1):
    """Starts a Python process with this number of CPU devices, in which compilers leave out most optimizations.

    Without these, other operations are merged, and all bits were the same even without `reproducible.alone`.
    """
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    environment.pop("NPROC", None)
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(workdir, *, devices, until=None, **changes):
    """Trains a run to its end, or kills it once it has saved step `until`."""
    values = {**REPRODUCIBLE, **changes}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    process = start(
        "-m", "mlpmixer_flax.train", "--config=digits.py", f"--workdir={workdir}", *overrides, devices=devices
    )
    if until is not None:
        while process.poll() is None and not (workdir / "checkpoints" / str(until)).exists():
            time.sleep(0.01)
        process.kill()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == (0 if until is None else -9), out
    return out


def saved_state(workdir, step):
    """Returns the arrays of a checkpoint by name."""
    folder = workdir.absolute() / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(tree, as_numpy))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes(), name


def scores(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key.startswith(("step", "test/"))} for row in rows if "test/loss" in row]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(workdir, devices=1)
    return workdir


def test_killed_runs_on_1_4_2_and_8_devices_have_the_bits_of_one_run_on_one_device(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    train(workdir, devices=1, until=3)
    for devices, until in [(4, 9), (2, 15), (8, None)]:
        train(workdir, devices=devices, until=until)
    assert_same_bits(saved_state(workdir, 30), saved_state(uninterrupted, 30))
    assert scores(workdir) == scores(uninterrupted) and len(scores(workdir)) == 2
    norms = [
        read_metrics(run / "metrics.jsonl")[-2]["train/gradient_norm"] for run in (workdir, uninterrupted)
    ]
    assert norms[0] == norms[1]  # of a single update


UPDATES = """
import json, sys
import os
import jax
import numpy as np
from flax import serialization
from mlpmixer_flax import load_config
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.evaluation import evaluate_classes
from mlpmixer_flax.training.setup import compile_steps, make_setup, settle, start_state

out, values, address, index = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
os.environ["NPROC"] = "8"  # before the devices are counted for the first time
jax.distributed.initialize(address, 2, index)
setup = make_setup(settle(load_config("digits.py", values), {}))
assert setup.mesh.size == 4 and jax.process_count() == 2
state = start_state(setup, None)
update, score = compile_steps(setup, state)
for step in range(30):
    state, metrics = update(state, sharding.put_batch(setup.train_batches[step], setup.mesh))
    if step in (14, 29):
        batches = (setup.test_batches[k] for k in range(len(setup.test_batches)))
        scores, _ = evaluate_classes(score, state.eval_params, batches, mesh=setup.mesh)
        print(json.dumps(scores))
tree = serialization.to_state_dict(state)
arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
np.savez(f"{out}/{index}.npz", **arrays)
"""


def test_two_processes_have_the_bits_of_one_run_on_one_device(uninterrupted, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    processes = [
        start("-c", UPDATES, str(tmp_path), json.dumps(REPRODUCIBLE), address, str(index), devices=2)
        for index in range(2)
    ]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outs)
    expected = saved_state(uninterrupted, 30)
    for index in range(2):
        assert_same_bits(dict(np.load(tmp_path / f"{index}.npz")), expected)
    found = [json.loads(line) for line in outs[0].splitlines() if line.startswith("{")]
    assert found == [
        {key.removeprefix("test/"): value for key, value in row.items() if key != "step"}
        for row in scores(uninterrupted)
    ]
