"""Tests the shortest way: a folder of images, one word after the program."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from made_datasets import encode
from made_folders import write

from mlpmixer_flax import UserError
from mlpmixer_flax.__main__ import PROGRAMS, main
from mlpmixer_flax.train import _config, parse

SMALL = [
    "--config.total_epochs=2",
    "--config.batch_size=8",
    "--config.model.num_blocks=1",
    "--config.model.hidden_dim=8",
    "--config.model.channels_mlp_dim=8",
    "--config.model.tokens_mlp_dim=8",
]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a folder of 40 images of 50 px, dark and bright ones."""
    root = tmp_path_factory.mktemp("place")
    for name, level in (("bright", 200), ("dark", 50)):
        for i in range(20):
            write(root, f"photos/{name}/{i}.png", data=encode(np.full((50, 60), level + i, np.uint8), "PNG"))
    return root


@pytest.mark.slow
def test_a_folder_is_all_that_training_needs(place):
    done = run("-m", "mlpmixer_flax", "train", "photos/", *SMALL, cwd=place)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "configs/folder.py, with values that suit the images and the device:\n  preproc" in said
    assert "preprocess.image_size_px=64" in said
    assert "total_epochs" not in said  # it was given
    assert max(map(len, said.splitlines()[:4])) <= 80
    (workdir,) = (place / "runs").iterdir()
    assert re.fullmatch(r"photos-\d{8}-\d{6}", workdir.name)
    config = json.loads((workdir / "config.json").read_text())
    assert config["dataset"] == f"folder:{place / 'photos'}" and config["total_epochs"] == 2.0

    # More photos than before would suit another length; a run that is continued keeps its own.
    again = run(
        "-m", "mlpmixer_flax.train", "photos", f"--workdir={workdir}", "--config.total_epochs=3", cwd=place
    )
    assert again.returncode == 0, again.stderr
    assert "that suit" not in again.stdout and "continuing from step" in again.stdout


@pytest.mark.long
@pytest.mark.slow
def test_a_folder_goes_with_any_config(place):
    done = run("-m", "mlpmixer_flax.train", "photos", "--config=digits.py", "--workdir=d", *SMALL, cwd=place)
    assert done.returncode == 0, done.stderr
    config = json.loads((place / "d" / "config.json").read_text())
    assert config["dataset"] == f"folder:{place / 'photos'}" and config["preprocess"]["image_size_px"] == 8


def test_given_values_are_checked_with_those_that_suit_the_images(tmp_path):
    write(
        tmp_path, *(f"small/{name}/{i}.png" for name in "ab" for i in range(3))
    )  # of 6 px: patches of 4 px suit them
    small = str(tmp_path / "small")
    config = _config(parse([small, "--config.preprocess.image_size_px=28"]))
    assert (config.preprocess.image_size_px, config.model.patches.size) == (28, (4, 4))
    config = _config(parse([small, "--config.resolutions_px=16,32,48"]))
    assert (config.preprocess.image_size_px, config.resolutions_px) == (32, (16, 32, 48))
    with pytest.raises(UserError, match="lacks preprocess.image_size_px=32"):
        _config(parse([small, "--config.resolutions_px=16,48"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: nothing to train on: give a folder of images, such as photos/, or --config=FILE"),
        (["nowhere"], "error: folder 'nowhere' does not exist"),
        (
            ["photos", "--lr=1"],
            "error: cannot use '--lr=1': did you mean --config.optimizer.learning_rate=1?",
        ),
        (
            ["photos", "--config.dataset=digits"],
            "photos and --config.dataset=digits are two datasets: leave one of them out",
        ),
        (["--config=digits.py", "--config.total_epochs", "3"], "did you mean --config.total_epochs=VALUE"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(place, tmp_path, arguments, message):
    arguments = [str(place / word) if word == "photos" else word for word in arguments]
    done = run("-m", "mlpmixer_flax.train", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_package_lists_its_programs(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name in PROGRAMS:
        assert re.search(rf"^  mlpmixer {name} +\S", listed, re.MULTILINE)
    assert main(["--help"]) == 0 and capsys.readouterr().out == listed
    assert max(map(len, listed.splitlines())) <= 80


def test_a_program_that_does_not_exist_is_named(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: there is no program 'trian': did you mean 'train'?\n"
    assert main(["xyz"]) == 2
    assert "choose one of train, predict" in capsys.readouterr().err


def test_every_program_is_in_the_list():
    import mlpmixer_flax

    folder = os.path.dirname(mlpmixer_flax.__file__)
    files = [name.removesuffix(".py") for name in os.listdir(folder) if name.endswith(".py")]
    programs = {n for n in files if n[0] != "_" and "def main(" in open(f"{folder}/{n}.py").read()}
    assert programs == PROGRAMS.keys()
