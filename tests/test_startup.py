"""Tests that programs keep freed memory and compiled programs, and that nothing about them stops a program."""

import os
import subprocess
import sys

import pytest

WITHOUT_CHOICE = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "MALLOC_")) and name != "GLIBC_TUNABLES"
}

# Fills and frees 48 MiB 20 times in a thread, as XLA does with the memory of a step; prints the page faults.
FAULTS = """
import resource, threading
from mlpmixer_flax.startup import describe, make_faster
make_faster()
def count():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def steps():
    before = count()
    for _ in range(20):
        b"x" * (48 * 2**20)
    print(count() - before, describe(), sep="|")
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""

COMPILE = """
import sys, time
import jax
from mlpmixer_flax.cli import exit_status
def program():
    started = time.perf_counter()
    x = jax.jit(lambda key: jax.random.truncated_normal(key, -2, 2, (4, 4)))(jax.random.key(0))
    print(time.perf_counter() - started, float(x.sum()))
sys.exit(exit_status(program))
"""


def run(code, **environment):
    """Returns the output of a Python program; it must end with status 0 and print no error."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**WITHOUT_CHOICE, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="it is for glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise(tmp_path):
    faults, kept = run(FAULTS, MLPMIXER_CACHE=str(tmp_path)).split("|")
    assert "freed memory and compiled programs" in kept
    for variables in ({"MLPMIXER_KEEP_MEMORY": "0"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
        others, kept = run(FAULTS, MLPMIXER_CACHE=str(tmp_path), **variables).split("|")
        assert int(others) > 5 * int(faults)
        assert "memory" not in kept and "compiled programs" in kept


def test_compiled_programs_are_kept_on_disk(tmp_path):
    first = run(COMPILE, MLPMIXER_CACHE=str(tmp_path))
    (folder,) = (tmp_path / "compiled").iterdir()
    entries = {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")}
    assert entries
    second = run(COMPILE, MLPMIXER_CACHE=str(tmp_path))
    assert entries == {file.name: file.stat().st_mtime_ns for file in folder.glob("*-cache")}
    assert first.split()[1] == second.split()[1]
    assert float(second.split()[0]) < float(first.split()[0])


def test_the_cache_is_off_if_the_user_says_so(tmp_path):
    run(COMPILE, MLPMIXER_CACHE=str(tmp_path / "cache"), JAX_ENABLE_COMPILATION_CACHE="0")
    run(COMPILE, MLPMIXER_CACHE=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert not list(tmp_path.glob("cache/compiled/*/*-cache"))


def test_damaged_entries_stop_nothing_and_incomplete_ones_are_replaced(tmp_path):
    first = run(COMPILE, MLPMIXER_CACHE=str(tmp_path))
    (folder,) = (tmp_path / "compiled").iterdir()
    for file in folder.glob("*-cache"):
        file.write_bytes(file.read_bytes()[:1000])
    assert run(COMPILE, MLPMIXER_CACHE=str(tmp_path)).split()[1] == first.split()[1]
    for file in folder.glob("*-atime"):  # a process that was killed has not written them yet
        file.unlink()
    run(COMPILE, MLPMIXER_CACHE=str(tmp_path))
    assert all(file.stat().st_size > 1000 for file in folder.glob("*-cache"))


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    run(COMPILE, MLPMIXER_CACHE=str(tmp_path / "file"))
    run(COMPILE, MLPMIXER_CACHE="/proc/none")
