"""Short forms of the scripts of benchmarks/reliability; docs/reliability.md has the results of the long ones."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks" / "reliability"


def run(script, *arguments, cwd):
    command = [sys.executable, SCRIPTS / f"{script}.py", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("invalid", "valid"),
    [("50", "2"), pytest.param("500", "50", marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_config_values_that_no_run_can_use_are_refused_and_others_train(tmp_path, invalid, valid):
    out = run("config_values", f"--invalid={invalid}", f"--count={valid}", cwd=tmp_path)
    assert f"invalid: {invalid} tried, none failed" in out and f"valid: {valid} tried, none failed" in out


@pytest.mark.slow
@pytest.mark.parametrize("count", ["20", pytest.param("5000", marks=pytest.mark.long)])
def test_damaged_files_of_every_kind_are_read_or_refused(tmp_path, count):
    out = run("fuzz", f"--count={count}", cwd=tmp_path)
    assert "| images |" in out and out.count(" | 0 | ") == out.count("\n") - 2


@pytest.mark.slow
@pytest.mark.parametrize("count", ["4", pytest.param("372", marks=pytest.mark.long)])
def test_flipped_bits_are_found(tmp_path, count):
    out = run("flipped_bits", f"--count={count}", cwd=tmp_path)
    assert out.count(f"{count} flips") == 2 and "CHANGED" not in out


@pytest.mark.long
@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path):
    assert "0 ended otherwise" in run("kills", "--count=6", cwd=tmp_path)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_soak_reports_memory_files_threads_and_disk(tmp_path):
    command = [sys.executable, SCRIPTS / "soak.py", "--minutes=0.5", "--predictions=200", "--interval=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    # In half a minute, memory is still growing.
    assert done.returncode in (0, 1) and done.stdout.count(" -> ") == 8, done.stdout + done.stderr
