"""The files that analyze writes about a run, and their contents."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax.analyze import main, steps_per_epoch
from mlpmixer_flax.export import export
from mlpmixer_flax.inference.embedding import features_of_split
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
    titles = ["", "Patch embedding of ", "Token mixing, block 0 of ", "Token mixing, block 1 of "]
    step = load_run(run).step
    for name, start in zip(PICTURES, titles, strict=True):
        with Image.open(run / "analysis" / name) as image:
            assert image.width == 1200 and len(set(image.convert("L").tobytes())) > 20
            assert image.text["Title"] == (f"{run}" if name == "curves.png" else f"{start}{run}, step {step}")
    names = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert names[0].startswith("using step ")
    assert names[2:] == ["curves", "token_mixing", "stem", "fewshot", "shuffle"]
    assert "shuffle: not run, because it trains" in out
    assert max(len(line) for line in out.splitlines() if str(run) not in line) <= 80
    found = json.loads((run / "analysis" / "fewshot.json").read_text())
    assert (found["dataset"], found["train_split"], found["test_images"]) == ("digits", "train", 364)
    assert f"fewshot: {found['accuracy']:.2%} of 364 images" in out and "(digits, split test)\n" in out
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
    out = capsys.readouterr().out
    assert (
        "of 100 images" in out
        and "(digits, split test[:100])\n  with 2 images per class of split train" in out
    )


@pytest.mark.long
@pytest.mark.slow
def test_shuffle_trains_three_times_and_says_which_split_is_scored(run, tmp_path, capsys):
    small = [*SMALL, "--config.model.num_blocks=1", "--config.eval_every_steps=0"]
    small += ["--config.train_split=train[300:]", "--config.test_split=train[:300]"]
    assert main([f"--workdir={run}", f"--output={tmp_path}", "shuffle", "--config=digits.py", *small]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert max(map(len, lines)) <= 80
    assert float(lines[0].split("at most ")[1].split()[0]) < 1e-5
    accuracies = [float(line.split("%")[0]) for line in lines if "% validation accuracy: " in line]
    assert len(set(accuracies)) == 3 and min(accuracies) > 15  # of 10 classes
    assert not any("test" in line for line in lines)
    assert written(tmp_path) == ["shuffle.png"]
    with Image.open(tmp_path / "shuffle.png") as image:
        assert image.text["Title"] == "digits.py, trained on images as they are and on shuffled ones"


def test_curves_of_a_run_that_has_saved_nothing_yet(run, tmp_path, capsys):
    young = shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints", "analysis"))
    assert main([f"--workdir={young}", "curves"]) == 0
    assert capsys.readouterr().out == f"{young}, files in {young}/analysis:\ncurves: curves.png\n"
    assert written(young / "analysis") == ["curves.png"]


def test_the_length_of_an_epoch_is_that_of_the_training_and_may_be_unknown(run, model, tmp_path):
    assert steps_per_epoch(model.config["batch_size"], run) == 1433 / 64
    for examples in ('"many"', "1" + "0" * 4000, "1" + "0" * 300, "NaN", "1e-320", "0", "-5", "true"):
        (tmp_path / "data.json").write_text(f'{{"train": {{"examples": {examples}}}}}')
        assert steps_per_epoch(model.config["batch_size"], tmp_path) is None
    for content in (None, "{", "[]", '{"train": {}}'):
        if content:
            (tmp_path / "data.json").write_text(content)
        else:
            (tmp_path / "data.json").unlink()
        assert steps_per_epoch(model.config["batch_size"], tmp_path) is None


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
        (
            ["shuffle", "--config.distill_from=a.npz"],
            "distill_from='a.npz' cannot be used for shuffle, because",
        ),
        (["shuffle", "--foo"], "cannot use '--foo': to change a key of the config, give --config.KEY=VALUE"),
        (
            ["shuffle", "--lr=1"],
            "cannot use '--lr=1': did you mean --config.optimizer.learning_rate=1?",
        ),
        (["shuffle", "--config.sed=1"], "the config has no key 'sed': did you mean 'seed'?"),
        (["shuffle", "--config=nope.py"], "config file nope.py does not exist"),
        # Only shuffle has a config.
        (["--lr=1"], "cannot use '--lr=1': did you mean shuffle --config.optimizer.learning_rate=1?"),
        (
            ["stem", "--lr", "1"],
            "cannot use '--lr': did you mean shuffle --config.optimizer.learning_rate=VALUE?",
        ),
        (["--foo"], "cannot use '--foo': --help lists all options"),
        (
            ["stem", "--config.seed=1"],
            "--config.seed=1 changes the config of shuffle: add shuffle, or leave it out",
        ),
        # The program's own options come before keys of the config.
        (["--batchsize=3"], "cannot use '--batchsize=3': did you mean --batch_size=3?"),
        (["shuffle", "--Test-Split=x"], "cannot use '--Test-Split=x': did you mean --test_split=x?"),
        (["--output=/dev/null/here", "stem"], "cannot write to /dev/null/here"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(run, tmp_path, capsys, arguments, message):
    assert main([f"--output={tmp_path}", *arguments, f"--workdir={run}"]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    if "cannot use" in err or "shuffle" in arguments:
        assert not out  # an error in the command is found before the model is loaded
    assert not list(tmp_path.iterdir())
