"""Golden weights, files that hold them, and how such files are refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.files import open_weights

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    """Returns the arrays of a golden file as they are stored."""
    if name.startswith("timm"):
        return load_file(GOLDEN / f"{name}.safetensors")
    return dict(np.load(GOLDEN / f"{name}.npz"))


def save_npz(arrays, path):
    with path.open("wb") as file:  # given a path, NumPy would append .npz to the name
        np.savez(file, **arrays)


def save_compressed(arrays, path):
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


CONTAINERS = [save_npz, save_compressed, save_file]


def read_all(path):
    weights = open_weights(path)
    return {name: weights.read(name) for name in weights.shapes}


def refusal(path, act=read_all):
    """Returns the sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        act(path)
    sentence = str(caught.value)
    assert str(path) in sentence and ": " in sentence and "\n" not in sentence and len(sentence) < 500
    return sentence
