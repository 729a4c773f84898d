"""Tests that programs use huge pages and keep compiled programs, and that nothing about it stops a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MADVISE = HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text()
WITHOUT_CHOICE = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT")) and name != "GLIBC_TUNABLES"
}

COMPILE = """
import sys, time
import jax
from mlpmixer_flax.ending import exit_status
def program():
    started = time.perf_counter()
    x = jax.jit(lambda key: jax.random.truncated_normal(key, -2, 2, (4, 4)))(jax.random.key(0))
    print(time.perf_counter() - started, float(x.sum()))
sys.exit(exit_status(program))
"""


def run(code, **environment):
    """Returns the output of Python code."""
    return run_program(["-c", code], **environment)


def run_program(command, **environment):
    """Returns the output of a command of Python; it must end with status 0 and print no error."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**WITHOUT_CHOICE, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not MADVISE, reason="this system gives huge pages to all programs, or to none")
@pytest.mark.parametrize(
    "command", [["-m", "mlpmixer_flax.pretrained"], ["-m", "mlpmixer_flax", "pretrained"]]
)
def test_programs_start_with_huge_pages_unless_the_user_says_otherwise(tmp_path, command):
    # The time of a page fault is not measured here: benchmarks/side_by_side.py does.
    (tmp_path / "sitecustomize.py").write_text(
        "import os; print(os.environ.get('GLIBC_TUNABLES'), flush=True)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    started = run_program(command, PYTHONPATH=path).split("\n")
    assert started[:2] == ["None", "glibc.malloc.hugetlb=1"] and "Mixer" in "".join(started[2:])
    assert "hugetlb" not in run_program(command, PYTHONPATH=path, GLIBC_TUNABLES="")


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
