"""Runs lines of a help text that use an exported file, in a process without our package."""

import subprocess
import sys

import numpy as np

_CODE = """
import sys
import numpy as np

lines, given, found, kept, without = sys.argv[1:]
results = {}
for size, images in np.load(given).items():
    exec(lines)
    results[size] = probabilities
np.savez(found, **{name: globals()[name] for name in kept.split()}, **results)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"mlpmixer_flax", *without.split()}, loaded
"""


def predict_elsewhere(lines, tmp_path, *, cwd, without, kept=""):
    """Returns number -> so many random digits, and what the lines predict of them, with other variables that they set.

    Args:
      lines: Python, from `images` to `probabilities`.
      cwd: where the exported file is.
      without: packages that must not be loaded; with spaces between, as in `kept`.
      kept: names of other variables.
    """
    rng = np.random.default_rng(0)
    given = {str(n): rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8) for n in (1, 3, 8)}
    np.savez(tmp_path / "given.npz", **given)
    files = [str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    command = [sys.executable, "-c", _CODE, lines, *files, kept, without]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return given, np.load(tmp_path / "found.npz")
