"""Real faults for tests: a small disk, a user without root's rights, little memory, a program and what it prints."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys

import pytest

QUICK_TO_COMPILE = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@contextlib.contextmanager
def small_disk(folder, size_kb):
    """Mounts an empty disk of this size on a folder, which is created; skips the test if that is not permitted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    try:
        refused = subprocess.run(command, capture_output=True, text=True).returncode
    except FileNotFoundError:
        refused = True
    if refused:
        pytest.skip("mounting a disk needs Linux and the rights of root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave_kb=0):
    """Fills the disk of a folder but for some KiB; returns the file that does it."""
    file = folder / "filling"
    with file.open("wb", buffering=0) as filling, contextlib.suppress(OSError):
        while True:
            filling.write(bytes(1024))
    os.truncate(file, max(0, file.stat().st_size - leave_kb * 1024))
    return file


# --- what a program may lack; `run` takes the name of one of these


def without_rights():
    """Takes the right of root to read and write any file; it is gone after the next program is started."""
    drop_capability, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    for capability in (override, search):
        ctypes.CDLL(None).prctl(drop_capability, capability, 0, 0, 0)


def with_little_memory():
    """Limits the address space to 20 GiB, of which JAX takes several."""
    resource.setrlimit(resource.RLIMIT_AS, (20 * 2**30, resource.RLIM_INFINITY))


def with_small_files():
    """Limits the size of files that are written to 10 kB; a checkpoint has 15 kB in one file of its metadata."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def run(program, *arguments, lacking=None, env=None, output=subprocess.DEVNULL):
    """Runs a program in a process; returns (exit status, stderr), and checks that stderr has no traceback."""
    start = [sys.executable, __file__, lacking.__name__] if lacking else [sys.executable]
    done = subprocess.run(
        [*start, "-m", f"mlpmixer_flax.{program}", *map(str, arguments)],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=QUICK_TO_COMPILE | (env or {}),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def start_training(*arguments, until):
    """Starts a run in a process, and returns the process after it has printed a line that begins with `until`."""
    command = [sys.executable, "-u", "-m", "mlpmixer_flax.train", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=QUICK_TO_COMPILE
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith(until):
            break
    return process


if __name__ == "__main__":
    vars()[sys.argv[1]]()
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
