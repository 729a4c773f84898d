"""Starts JAX's distributed runtime in a run with several processes, before anything else uses JAX."""

import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import in_one_line, start_devices

# How soon JAX ends the other processes if one stops without an error message. Compiling does not delay a heartbeat.
_HEARTBEAT_TIMEOUT_SECONDS = 40
_SHUTDOWN_TIMEOUT_SECONDS = 60

# Environment variables that hold the number of tasks
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE", "MEGASCALE_NUM_SLICES")
# and those that list the machines of a TPU
_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def start(distributed: str = "auto") -> None:
    """Connects this process with the other processes of the run, if there are any, and starts the devices.

    It connects nothing if the program has called `jax.distributed.initialize` already.

    Args:
      distributed: "auto": finds the other processes if the environment says that this is one of several tasks.
        "off": this process is a run of its own. "COORDINATOR,N,I": this is process I (from 0) of N; process 0 opens
        a port at the address COORDINATOR, such as "10.0.0.1:1234".

    Raises:
      UserError: this is one of several tasks and the others cannot be found, or `distributed` cannot be used, or the
        devices cannot be started.
    """
    if distributed != "off" and not jax.distributed.is_initialized():
        _connect(distributed)
    start_devices()


def _connect(distributed: str) -> None:
    if distributed != "auto":
        coordinator, count, index = _parse(distributed)
        failure = _initialize(
            coordinator_address=coordinator,
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate",  # otherwise JAX would choose devices by the variables of Slurm
        )
        if failure:
            raise UserError(
                f"--distributed={distributed} cannot be used ({failure}): check the environment variables whose names begin with JAX_"
            )
        return
    sign = find_sign(os.environ)
    # JAX sets TPU_ML_PLATFORM on a machine with TPUs. There, only the metadata server knows about other machines.
    if sign or "TPU_ML_PLATFORM" in os.environ:
        found = not _initialize(local_device_ids=choose_devices(os.environ))
        several, unknown = jax.process_count() > 1, not sign or (found and sign.startswith("JOB_"))
        if not (found if several else unknown):
            raise UserError(
                f"this is one of several tasks ({sign or 'a machine of a TPU pod'}), but JAX cannot find the others: give "
                "--distributed=COORDINATOR,N,I (address:port of the first task, number of tasks, number of this task "
                "from 0), or --distributed=off if each task is a run of its own"
            )


def check_alone(program: str) -> None:
    """Checks that a program, which cannot divide its work, is not started once per task.

    Raises:
      UserError: it is.
    """
    # The script of a Slurm job knows the number of tasks, but runs only once.
    is_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_NODELIST" not in os.environ
    sign = find_sign(os.environ)
    if sign and not is_script:
        raise UserError(
            f"{program} works in one process, and this is one of several tasks ({sign}): start it once, or give "
            "--distributed=off if each task has its own work"
        )


def find_sign(environment: Mapping[str, str]) -> str:
    """Returns the variable that says that this is one of several tasks, "SLURM_NTASKS=2"; "" if there is none."""
    for name in _COUNTS:
        if (value := environment.get(name, "")).isdecimal() and int(value) > 1:
            return f"{name}={value}"
    for name in _LISTS:
        if "," in (value := environment.get(name, "")):
            return f"{name}={value:.60}"
    # A task of an indexed Kubernetes job; the job does not say how many there are.
    name = "JOB_COMPLETION_INDEX"
    return f"{name}={environment[name]}" if name in environment else ""


def choose_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns `local_device_ids` for JAX: [] = all that this task sees, None = JAX decides.

    Under Slurm and Open MPI, JAX takes one GPU per task: the one whose number is that of the task on its machine.
    That is wrong if a machine has only one task, or if the launcher shows each task only its own GPU.
    """
    per_machine = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    alone = {environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""), *per_machine} - {""} == {"1"}
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    chosen = "JAX_LOCAL_DEVICE_IDS" in environment
    return [] if not chosen and (alone or (shown and "," not in shown)) else None


def _parse(distributed: str) -> tuple[str, int, int]:
    match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", distributed)
    if not match:
        raise UserError(
            f"--distributed={distributed!r} cannot be used: give auto, off or COORDINATOR,N,I, such as 10.0.0.1:1234,2,0"
        )
    coordinator, count, index = match[1], int(match[2]), int(match[3])
    if index >= count:
        raise UserError(
            f"--distributed={distributed}: process {index} of {count} does not exist: count from 0"
        )
    return coordinator, count, index


def _initialize(**arguments: Any) -> str:
    """Calls `jax.distributed.initialize`; returns "", or what is wrong if JAX cannot use the environment.

    Raises:
      UserError: JAX is in use already, or the processes did not find each other.
    """
    # With it, JAX would handle SIGTERM before the run does, and a run that is not yet in its loop would ignore it.
    jax.config.update("jax_enable_preemption_service", False)
    # If they never come, JAX ends this process after five minutes, without a word about why.
    note = "waiting for the other processes of this run; start all of them, and check --distributed"
    waiting = threading.Timer(20, print, [note], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_SECONDS,
            **arguments,
        )
    # The last two: there is no metadata server, or no package to ask it.
    except (ValueError, OSError, ImportError) as error:
        return in_one_line(error)
    except RuntimeError as error:
        if "before any JAX calls" in str(error):
            raise UserError(
                "this is one of several tasks, and JAX was used before it was connected with the others: call "
                "jax.distributed.initialize() first, or give --distributed=off if each task is a run of its own"
            ) from None
        reason = in_one_line(error)
        raise UserError(
            f"the processes of this run did not find each other ({reason}): check that all of them run and that the "
            "machine of process 0 can be reached, or give another --distributed"
        ) from None
    finally:
        waiting.cancel()
    return ""
