"""Files that killed processes have left unfinished."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mlpmixer_flax.atomic import replacing

WRITE = """
import os, sys
from pathlib import Path
from mlpmixer_flax.atomic import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(bytes(1000))
    os.kill(os.getpid(), 9)
"""


def leave_unfinished(file, *, days):
    """Kills a process that writes a file; returns what it leaves, as if that was some days ago."""
    before = {*file.parent.iterdir()}
    process = subprocess.run([sys.executable, "-c", WRITE, str(file)])
    assert process.returncode == -signal.SIGKILL
    (left,) = {*file.parent.iterdir()} - before
    os.utime(left, times=(time.time() - days * 86_400,) * 2)
    return left


@pytest.mark.parametrize("name", ["weights.npz", "[a]*.json"])
def test_what_a_killed_process_has_left_is_removed_after_a_day(tmp_path, name):
    file = tmp_path / name
    old, new = (leave_unfinished(file, days=days) for days in (2, 0.5))
    of_another = leave_unfinished(tmp_path / f"{name}.json", days=2)
    own = tmp_path / f"{name}.mine.tmp"
    own.write_text("a file of the user")
    os.utime(own, times=(0, 0))
    with replacing(file) as opened:
        opened.write(b"complete")
    assert not old.exists()
    # Another process may still write the new one.
    assert {*tmp_path.iterdir()} == {file, new, of_another, own}
    assert file.read_bytes() == b"complete"
