"""Tests what a config is settled to, and how scores of a split are called."""

import os

import numpy as np
import pytest
from made_datasets import encode, write_dataset
from made_folders import names, write

from mlpmixer_flax import load_config
from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.data.dataset import find_dataset
from mlpmixer_flax.training.setup import _print_origin, _scored, to_store


def scored(dataset, test_split, data_dir=""):
    return _scored(find_dataset(dataset, data_dir=data_dir), test_split)


@pytest.mark.parametrize(
    ("folders", "split", "expected"),
    [
        (["a", "b"], "validation", "validation"),
        (["a", "b"], "test", "validation"),  # there are no test images
        (["a", "b"], "train[90%:]", "validation"),
        (["train/a", "train/b", "val/a", "val/b"], "val", "validation"),
        (["train/a", "train/b", "val/a", "val/b"], "test", "validation"),
        (["Training/a", "Training/b", "dev/a", "dev/b"], "dev[:50%]", "validation"),
        (["train/a", "train/b", "test/a", "test/b"], "test", "test"),
        (["train/a", "train/b", "test/a", "test/b"], "validation", "validation"),
        (["training_set/a", "training_set/b", "test_set/a", "test_set/b"], "test_set[:50%]", "test"),
        (["train/a", "train/b", "test/a", "test/b"], "validation+test", "test"),
    ],
)
def test_scores_of_a_folder_are_called_after_the_images(tmp_path, folders, split, expected):
    folder = write(tmp_path, *(name for folder in folders for name in names(folder, 20)))
    assert scored(f"folder:{folder}", split) == expected


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test", "test"),
        ("test[:2]", "test"),
        ("train[50%:]", "validation"),
        ("validation", "validation"),
        ("val", "validation"),
        ("validation_mini", "validation"),
        ("plants", "test"),
        ("test+validation", "test"),
    ],
)
def test_scores_of_a_tfds_dataset_are_called_after_its_splits(tmp_path_factory, split, expected):
    place = tmp_path_factory.getbasetemp() / "prepared"
    if not place.exists():
        example = (encode(np.zeros((8, 8), np.uint8)), 0)
        splits = ("train", "test", "validation", "val", "validation_mini", "plants")
        write_dataset(place, "splits", {name: [example] * 4 for name in splits}, image_shape=(8, 8, 1))
    assert scored("splits", split, str(place)) == expected


def test_a_run_stores_absolute_paths_of_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = get_config()
    for dataset, data_dir, stored in [
        ("folder:photos", "tfds", (f"folder:{tmp_path}/photos", f"{tmp_path}/tfds")),
        ("folder:~/photos", "~/tfds", (f"folder:{tmp_path}/home/photos", f"{tmp_path}/home/tfds")),
        ("mnist:3.0.1", "", ("mnist:3.0.1", "")),
    ]:
        config.update({"dataset": dataset, "data_dir": data_dir})
        found = to_store(config)
        assert (found["dataset"], found["data_dir"]) == stored
    assert os.path.isabs(found["data_dir"]) or not found["data_dir"]


def test_what_weights_say_about_their_training_is_cut(capsys):
    config = load_config("digits.py", {"init_from": "w.npz", "preprocess.mean": (0.5,)})
    _print_origin(config, resolve(config, {}), {"preprocess.mean": "\x1b" * 9999})
    line = capsys.readouterr().out
    assert line.startswith("preprocess.mean=(0.5,), although w.npz was trained with \\x1b\\x1b")
    assert line[:-1].isprintable() and len(line) < 300
