"""Tests the way from a folder of photos to predictions, with the config made for it."""

import contextlib
import csv
import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from written_events import events, scalars

from mlpmixer_flax import predict, train
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import describe_weights, open_run
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.weights.files import write_npz

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_to_compile")]

CLASSES = {"zero": 0, "six": 6, "seven": 7}
MODEL = {"patches": {"size": (4, 4)}, "hidden_dim": 128, "num_blocks": 2, "tokens_mlp_dim": 16}
MODEL["channels_mlp_dim"] = 32


def write_photos(root, split, number):
    """Writes `number` digits of each class: in colour, not square, in three formats."""
    examples = open_examples("digits", split)
    rng = np.random.default_rng(0)
    for name, digit in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(examples.images[examples.labels == digit][:number]):
            digit_px = np.asarray(Image.fromarray(image[..., 0]).resize((40, 48), Image.Resampling.BICUBIC))
            colours = rng.integers(100, 256, 3) * (digit_px[..., None] / 255)
            file = root / name / f"{name} {i}.{('png', 'JPG', 'webp')[i % 3]}"
            Image.fromarray(colours.astype(np.uint8)).save(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is fine-tuned from weights with seven other classes."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "photos", "train", 40)
    model = MlpMixer(num_classes=7, **MODEL)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    write_npz(root / "weights.npz", jax.device_get(params), metadata={})
    small = {f"model.{key}": value for key, value in MODEL.items() if key != "patches"}
    small |= {"model.patches.size": (4, 4), "preprocess.image_size_px": 16, "batch_size": 16}
    overrides = {"init_from": root / "weights.npz", "dataset": f"folder:{root / 'photos'}", **small}
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        command = ["--config=configs/finetune_folder.py", f"--workdir={root / 'run'}", *arguments]
        assert train.main(command) == 0
    (root / "said").write_text(said.getvalue())
    return root / "run"


def test_the_run_follows_the_config_and_knows_the_classes(run):
    config = json.loads((run / "config.json").read_text())
    assert config["augment"]["flip"] and config["augment"]["min_crop_area"] == 0.3
    assert config["optimizer"]["name"] == "sgd" and config["optimizer"]["clip_norm"] == 1.0
    assert json.loads((run / "class_names.json").read_text()) == sorted(CLASSES)
    rows = read_metrics(run / "metrics.jsonl")
    tested = [row["step"] for row in rows if "validation/accuracy" in row]
    # About 96 photos to train on are 6 steps of 16 images; each of the 20 epochs ends with an evaluation.
    photos = json.loads((run / "data.json").read_text())["train"]["examples"]
    total = round(20 * photos / 16)
    assert abs(photos - 96) < 8 and tested == sorted({*range(6, total + 1, 6), total})
    rates = {row["step"]: row["train/learning_rate"] for row in rows if "train/learning_rate" in row}
    assert rates[total] < rates[10]


def test_scores_of_the_validation_photos_are_called_so_everywhere(run):
    names = {name for row in read_metrics(run / "metrics.jsonl") for name in row}
    assert {"validation/loss", "validation/accuracy"} <= names
    assert not any(name.startswith("test/") for name in names)
    found = events(run)
    tags = {tag for _, tag, _ in scalars(found)}
    assert {"validation/loss", "validation/accuracy", "validation_class_accuracy/six"} <= tags
    assert not any(tag.startswith("test") for tag in tags)
    said = (run.parent / "said").read_text()
    assert re.search(r": \d+ training images, \d+ validation images, 3 classes$", said, re.MULTILINE)
    assert re.search(r"^step 6, epoch \d\.\d+: validation accuracy 0\.\d+, loss \d", said, re.MULTILINE)
    assert re.search(r"^done: validation accuracy \d+\.\d\d% after \d+ steps, in ", said, re.MULTILINE)
    assert "test" not in said.replace(str(run.parent), "").replace("no test images", "").replace(
        "split 'test'", ""
    )
    step = default_best(run)
    assert open_run(run).step == step and describe_weights(run, "best", step=step).startswith(
        f"step {step}, the best checkpoint (validation accuracy "
    )


def default_best(run):
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "validation/accuracy" in row]
    return max(rows, key=lambda row: (row["validation/accuracy"], row["step"]))["step"]


def test_new_photos_are_classified_as_well_as_the_test_accuracy_says(run, tmp_path, capsys):
    write_photos(tmp_path / "new", "test", 30)
    assert predict.main([f"--workdir={run}", "--top=1", "--csv", str(tmp_path / "new")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 90 and {row["class_name"] for row in rows} == CLASSES.keys()
    right = np.mean([f"/{row['class_name']}/" in row["file"] for row in rows])
    tested = [
        row["validation/accuracy"]
        for row in read_metrics(run / "metrics.jsonl")
        if "validation/accuracy" in row
    ]
    assert tested[0] < 0.6 and min(tested[-1], right) > 0.7  # of three classes
