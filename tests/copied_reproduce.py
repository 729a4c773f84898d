"""A copy of the program that runs published figures again, and stand-ins for the weights and data that it needs."""

import importlib
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from made_datasets import encode

from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.download import cache_file
from mlpmixer_flax.weights.files import write_safetensors

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DIGITS = (  # a row that can run anywhere
    'ROWS["digits"] = Row("digits", "nowhere", 50.0, "1 epoch", first=40.0, config="digits.py", changes='
    '{"total_epochs": 2.0, "model.num_blocks": 1, "augment.mixup_alpha": 0.0, "eval_every_epochs": 1.0, '
    '"log_every_steps": 5})\n'
)


def copied_program(folder, monkeypatch):
    """Returns the module of a copy of the program in an empty folder, with the row "digits".

    The cache of weights and the TFDS directory are empty, and the folder is the current one.
    """
    copy = folder / "benchmarks"
    copy.mkdir()
    (folder / "docs").mkdir()
    for file in BENCHMARKS.glob("*.py"):
        shutil.copy(file, copy)
    with (copy / "figures.py").open("a") as file:
        file.write(DIGITS)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLPMIXER_CACHE", str(folder / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return imported("reproduce", copy, monkeypatch)


def imported(name, folder, monkeypatch):
    """Returns a module of benchmarks/ or of a copy of it, although those of another one may have been imported before."""
    for file in BENCHMARKS.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


def stand_in(name, *, num_blocks, favorite=None):
    """Puts a small file of published weights, with their layout and all of their classes, where a download would.

    The stand-in has random weights; with `favorite`, it always predicts this class.
    """
    published = PUBLISHED[name]
    patches = {"size": published.origin["model"]["patches"]["size"]}
    sizes = {"hidden_dim": 8, "num_blocks": num_blocks, "tokens_mlp_dim": 6, "channels_mlp_dim": 8}
    model = MlpMixer(num_classes=published.num_classes, patches=patches, **sizes)
    images = np.zeros((1, 224, 224, 3), np.float32)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    rng = np.random.default_rng(0)
    params = {key: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for key, leaf in shapes.items()}
    if favorite is not None:
        params["head", "bias"][favorite] = 1e3
    if name.startswith("hf-hub:"):
        from huggingface_hub.constants import HF_HUB_CACHE

        owner_name = published.url.removeprefix("hf-hub:")
        folder = Path(HF_HUB_CACHE) / f"models--{owner_name.replace('/', '--')}"
        file = folder / "snapshots" / "a" / "model.safetensors"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a")
        write = partial(write_safetensors, metadata={})
    else:
        file, write = (
            cache_file(published.url),
            lambda file, tree: np.savez(file, **flatten_dict(tree, sep="/")),
        )
    file.parent.mkdir(parents=True)
    write(file, unflatten_dict(params))


def write_photos(folder, classes, *, count=4):
    """Writes train/ and val/ in ImageNet's layout: a folder per class, JPEG files of several sizes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, factor in classes.items():
            for number in range(count * factor):
                pixels = rng.integers(0, 256, (rng.integers(30, 60), 40, 3)).astype(np.uint8)
                file = folder / split / name / f"{split}_{number}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encode(pixels, "JPEG"))
