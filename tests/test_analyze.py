"""The files that analyze writes about a run, and their contents."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax.analyze import main
from mlpmixer_flax.export import export
from mlpmixer_flax.inference.fewshot import features_of_split
from mlpmixer_flax.inference.figures import compare
from mlpmixer_flax.inference.load import load_run

SMALL = [
    "--config.model.hidden_dim=16",
    "--config.model.num_blocks=2",
    "--config.augment.mixup_alpha=0",
    "--config.total_steps=20",
    "--config.eval_every_steps=10",
]
PICTURES = ["curves.png", "stem.png", "token_mixing_block00.png", "token_mixing_block01.png"]


pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory):
    """Returns a run of our own: the program writes into it."""
    return shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def model(run):
    return load_run(run)


def written(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.slow
def test_program_shows_all_parts_of_a_run_except_the_one_that_trains(run, capsys):
    assert main([f"--workdir={run}"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert written(run / "analysis") == sorted([*PICTURES, "fewshot.json"])
    for name in PICTURES:
        with Image.open(run / "analysis" / name) as image:
            assert image.width == 1200 and len(set(image.convert("L").tobytes())) > 20
    names = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert names[0].startswith("using step ")
    assert names[2:] == ["curves", "token_mixing", "stem", "fewshot", "shuffle"]
    assert "shuffle: not run, because it trains" in out
    assert max(len(line) for line in out.splitlines() if str(run) not in line) <= 80
    found = json.loads((run / "analysis" / "fewshot.json").read_text())
    assert (found["dataset"], found["train_split"], found["test_images"]) == ("digits", "train", 364)
    assert f"fewshot: {found['accuracy']:.2%} of 364" in out
    assert 0.3 < found["accuracy"] < 1


def test_features_are_the_input_of_the_head_for_every_image_in_order(model):
    examples = model.open("digits", "test")
    found, labels = features_of_split(model, examples, batch_size=50)  # 364 images: 14 in the last batch
    images, expected_labels = examples.read(np.arange(len(examples)))
    np.testing.assert_array_equal(labels, expected_labels)
    head = model.params["head"]
    logits = model.logits(model.params, images)
    np.testing.assert_allclose(found @ head["kernel"] + head["bias"], logits, atol=1e-4)


def test_features_to_draw_from_include_enough_of_each_class_and_no_image_twice(model):
    examples = model.open("digits", "train")
    every, _ = features_of_split(model, examples)
    some, labels = features_of_split(model, examples, per_class=5, batch_size=10)
    counts = np.bincount(labels)
    assert counts.min() >= 5 and len(some) < 250
    assert min(np.bincount(labels[:-10], minlength=10)) < 5  # no batch more than necessary
    beyond, labels = features_of_split(model, examples, per_class=10_000)
    assert len(beyond) == len(labels) == len(every)
    np.testing.assert_allclose(np.sort(beyond[:, 0]), np.sort(every[:, 0]), atol=1e-4)
    assert abs(beyond[:, 0] - every[:, 0]).max() > 0.1  # in another order


def test_images_of_a_folder_are_cropped_once(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 12, 16), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    cropping = replace(model, preprocess={**model.preprocess, "crop_fraction": 0.5})
    examples = cropping.open(f"folder:{tmp_path}", "train")
    images, _ = examples.read(np.arange(len(examples)))
    assert images.shape[1:] == (8, 8, 1)
    headless = replace(model, module=model.module.clone(num_classes=0))
    expected = headless.logits(model.params, images)
    np.testing.assert_allclose(features_of_split(cropping, examples)[0], expected, atol=1e-4)


def test_fewshot_uses_the_test_split_and_shots_of_the_options(run, tmp_path, capsys):
    arguments = ["fewshot", "--dataset=digits", "--test_split=test[:100]", "--shots=2"]
    assert main([f"--workdir={run}", f"--output={tmp_path}", *arguments]) == 0
    assert written(tmp_path) == ["fewshot.json"]
    found = json.loads((tmp_path / "fewshot.json").read_text())
    assert (found["shots"], found["test_images"], found["test_split"]) == (2, 100, "test[:100]")
    assert "with 2 images per class" in capsys.readouterr().out


@pytest.mark.slow
def test_shuffle_trains_three_times_and_draws_the_curves(run, tmp_path, capsys):
    small = [*SMALL, "--config.model.num_blocks=1", "--config.eval_every_steps=0"]
    assert main([f"--workdir={run}", f"--output={tmp_path}", "shuffle", "--config=digits.py", *small]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert max(map(len, lines)) <= 80
    assert float(lines[0].split("at most ")[1].split()[0]) < 1e-5
    accuracies = [float(line.split("%")[0]) for line in lines if "test accuracy" in line]
    assert len(set(accuracies)) == 3 and min(accuracies) > 15  # of 10 classes
    assert written(tmp_path) == ["shuffle.png"]


def test_runs_are_compared_in_the_same_axes():
    runs = {
        "a": [{"step": 1, "train/loss": 3.0, "test/accuracy": 0.1}, {"step": 2, "train/loss": 2.0}],
        "b": [{"step": 2, "train/loss": 1.0, "test/accuracy": 0.7}],
    }
    loss, accuracy = compare(runs, title="two").axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("training loss", "test accuracy")
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 3], [2, 2]], [[2, 1]]]
    assert [line.get_label() for line in accuracy.lines] == ["a, last 0.1", "b, last 0.7"]


def test_weights_have_no_curves_and_no_dataset(model, tmp_path, capsys, monkeypatch):
    export(model, tmp_path / "run.npz", format="npz")
    monkeypatch.chdir(tmp_path)
    assert main(["--weights=run.npz"]) == 0
    assert written(Path("analysis")) == PICTURES[1:]
    out = capsys.readouterr().out
    assert "curves: left out, because run.npz has no training curves: give a run directory, --workdir" in out
    assert (
        "fewshot: left out, because run.npz is not a run and has no dataset of its own: give --dataset" in out
    )
    assert main(["curves", "--weights=run.npz"]) == 2
    assert "run.npz has no training curves: give a run directory, --workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stm"], "part 'stm' is unknown: choose from curves,"),
        (["--shots=0", "fewshot"], "shots=0 must be at least 1"),
        (["--batch_size=-1", "fewshot"], "batch_size=-1 must be at least 1"),
        (["--train_split=train[:9]", "fewshot"], "shots=5 is not possible, because class"),
        (["--dataset=digits", "--test_split=nope", "fewshot"], "nope"),
        (
            ["shuffle", "--config.init_from=a.npz"],
            "init_from='a.npz' cannot be used for shuffle, because it was trained on images that are not shuffled: set --config.init_from=",
        ),
        (["shuffle", "--foo"], "'--foo'"),
        (["--output=/dev/null/here", "stem"], "cannot write to /dev/null/here"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(run, tmp_path, capsys, arguments, message):
    assert main([f"--output={tmp_path}", *arguments, f"--workdir={run}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_options_that_no_part_uses_are_refused(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"--workdir={run}", "stem", "--config.seed=1"])
    assert stop.value.code == 2 and "--config.seed=1" in capsys.readouterr().err
