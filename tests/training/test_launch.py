"""How processes find each other: Slurm, Open MPI, by hand; what is refused."""

import os
import random
import re
import signal
import time
from pathlib import Path

import jax
import pytest
from made_folders import write
from several_processes import CHANGES, arguments, finish, read_until, start_all
from small_runs import rows

from mlpmixer_flax import UserError, fit, load_config
from mlpmixer_flax.predict import main as predict
from mlpmixer_flax.train import parse
from mlpmixer_flax.training.launch import choose_devices, find_sign, start

ROOT = Path(__file__).parent.parent.parent


def slurm(index):
    """Returns the variables of task `index` of a Slurm job with two tasks on this machine."""
    return {
        "SLURM_JOB_ID": os.environ["TEST_JOB_ID"],
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_tasks_of_slurm_share_the_default_run_directory_and_end_when_one_is_killed(
    tmp_path, monkeypatch, victim
):
    monkeypatch.setenv("TEST_JOB_ID", str(random.randrange(4096)))  # JAX makes a port of it
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    changes = {**CHANGES, "total_steps": 100_000}
    processes = start_all(2, "train", *arguments(changes), folders=folders, environment=slurm)
    read_until(processes[0], r"^step 8/")
    (workdir,) = (folders[0] / "runs").iterdir()
    assert rows(workdir)[-1]["step"] >= 8 and not list(folders[1].iterdir())
    processes[victim].kill()
    killed = time.monotonic()
    statuses, texts, errors = finish(processes, timeout=60)
    assert time.monotonic() - killed < 60
    if victim == 0:  # JAX's service was in it, so JAX itself ends the others
        assert statuses == [-signal.SIGKILL, -signal.SIGABRT]
        return
    assert statuses == [1, -signal.SIGKILL] and texts[1] == ""
    assert (
        errors[0] == "error: process 1 ended without an error message: it was killed, or its machine failed\n"
    )


@pytest.mark.slow
def test_one_of_several_tasks_that_cannot_find_the_others_is_refused(tmp_path):
    workdir = tmp_path / "run"
    # Without the address that Open MPI 4 gave.
    (process,) = start_all(
        1,
        "train",
        *arguments(CHANGES),
        f"--workdir={workdir}",
        environment=lambda _: {"OMPI_COMM_WORLD_SIZE": "2"},
    )
    statuses, _, errors = finish([process])
    assert statuses == [2] and errors == [
        "error: this is one of several tasks (OMPI_COMM_WORLD_SIZE=2), but JAX cannot find the others: give "
        "--distributed=COORDINATOR,N,I (address:port of the first task, number of tasks, number of this task from 0), "
        "or --distributed=off if each task is a run of its own\n"
    ]
    assert not workdir.exists()


def test_variables_that_jax_cannot_use_are_refused_and_start_no_run_of_its_own(tmp_path):
    """With them, JAX connects nothing; two such runs would write into one directory."""
    options = ["--config=digits.py", f"--workdir={tmp_path / 'run'}", "--distributed=127.0.0.1:12987,2,0"]
    (process,) = start_all(1, "train", *options, environment=lambda _: {"JAX_LOCAL_DEVICE_IDS": "0:"})
    (status,), _, (error,) = finish([process], timeout=120)
    assert status == 2 and error.count("\n") == 1
    assert error.startswith(
        "error: --distributed=127.0.0.1:12987,2,0 cannot be used (invalid literal for int() with base 10"
    )
    assert not (tmp_path / "run").exists()


def test_one_of_several_tasks_that_has_used_jax_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    jax.devices()
    with pytest.raises(
        UserError, match=r"JAX was used before .*: call jax.distributed.initialize\(\) first, or"
    ):
        fit(load_config("digits.py"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    start("off")


def test_predict_refuses_to_run_once_per_task(digits_run, tmp_path, monkeypatch, capsys):
    image = write(tmp_path, "a.png") + "/a.png"
    command = [f"--workdir={digits_run}", image]
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert predict(command) == 0  # in the script of a job
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    assert predict([*command, "--distributed=off"]) == 0
    capsys.readouterr()
    assert predict(command) == 2
    assert capsys.readouterr().err == (
        "error: predict works in one process, and this is one of several tasks (SLURM_NTASKS=2): start it once, or give "
        "--distributed=off if each task has its own work\n"
    )


@pytest.mark.parametrize(
    "environment, sign",
    [
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2"),
        ({"OMPI_COMM_WORLD_SIZE": "16"}, "OMPI_COMM_WORLD_SIZE=16"),
        ({"PMI_SIZE": "3"}, "PMI_SIZE=3"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2"),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "TPU_WORKER_HOSTNAMES=10.0.0.1,10.0.0.2"),
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX=0"),
        ({"SLURM_NTASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"SLURM_NTASKS": "", "WORLD_SIZE": "many"}, ""),
        ({}, ""),
    ],
)
def test_signs_of_several_tasks(environment, sign):
    assert find_sign(environment) == sign


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, []),  # one task per machine takes all of its GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, []),  # each sees only its own
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({}, None),
    ],
)
def test_devices_of_a_task(environment, devices):
    assert choose_devices(environment) == devices


@pytest.mark.parametrize(
    "given, message",
    [
        ("on", "--distributed='on' cannot be used: give auto, off or COORDINATOR,N,I"),
        ("10.0.0.1,2,0", "cannot be used"),
        ("10.0.0.1:1234,2", "cannot be used"),
        ("10.0.0.1:1234,2,2", "process 2 of 2 does not exist: count from 0"),
    ],
)
def test_an_unusable_distributed_is_refused(given, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        start(given)


def test_launch_commands_of_the_page_are_understood():
    page = (ROOT / "docs" / "scaling.md").read_text().replace("\\\n", "")
    commands = re.findall(
        r"(?:srun|mpirun|CUDA_VISIBLE|--command).*?python -m mlpmixer_flax\.train ([^'\"\n]*)", page
    )
    assert len(commands) == 4
    for command in commands:
        parsed = parse(command.split())
        load_config(str(ROOT / parsed.config), parsed.overrides)
