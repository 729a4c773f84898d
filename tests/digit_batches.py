"""Digits as a test reads them, batches that must be equal, and code for a new process."""

import subprocess
import sys

import numpy as np

from mlpmixer_flax.dataloader import open_examples


def digits(**options):
    return open_examples("digits", "train", **options)


def assert_same(a, b):
    assert a.keys() == b.keys() == {"image", "label", "mask"}
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
