"""Images with several labels: average precision, thresholds, the update, and the way from a table to sets of classes."""

import csv
import io
import json
import shutil

import jax
import numpy as np
import pytest
from documented import commands_below, run, words_of
from made_datasets import encode
from sklearn import metrics
from tiny_updates import CLASSES, MESH, config_with, fill, start, tiny_batch, tiny_model

from mlpmixer_flax import UserError, load
from mlpmixer_flax.data import augment
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.inference.multi_label import as_text, per_class, read_thresholds
from mlpmixer_flax.predict import as_set
from mlpmixer_flax.training.evaluation import one_batch_late
from mlpmixer_flax.training.multi_label import (
    average_precisions,
    label_scores,
    make_multi_label_step,
)
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import make_train_step
from mlpmixer_flax.training.validate import check_labels

# --- scores


def made_rows(n=200, classes=5):
    random = np.random.default_rng(0)
    label = (random.random((n, classes)) < [0.5, 0.3, 0.1, 0.02, 0]).astype(np.uint8)
    probability = np.round(np.clip(random.normal(0.3 + 0.3 * label, 0.2), 0, 1), 2)  # many are equal
    return {"label": label, "probability": np.float32(probability), "loss": np.ones(n)}


def test_average_precision_equals_that_of_scikit_learn_also_with_equal_scores():
    rows = made_rows()
    found = average_precisions(rows["label"], rows["probability"])
    theirs = [
        metrics.average_precision_score(rows["label"][:, i], rows["probability"][:, i]) for i in range(4)
    ]
    np.testing.assert_allclose(found[:4], theirs)
    assert np.isnan(found[4])  # no image
    one = np.ones((3, 1))
    assert average_precisions(one[:1], np.full((1, 1), np.nan)) == average_precisions(one, one) == 1


def test_the_threshold_of_a_class_has_the_highest_f1_of_all():
    rows = made_rows()
    found = per_class(rows, list("abcde"))
    for number, row in enumerate(found[:4]):
        true, score = rows["label"][:, number], rows["probability"][:, number]
        each = [metrics.f1_score(true, score >= level) for level in np.unique(score)]
        said = score >= row["threshold"]
        assert row["f1"] == pytest.approx(max(each)) == pytest.approx(metrics.f1_score(true, said))
        assert row["precision"] == pytest.approx(metrics.precision_score(true, said))
        assert row["recall"] == pytest.approx(metrics.recall_score(true, said))
        assert row["threshold"] not in score  # halfway between two, so that rounding changes nothing
    assert found[4] == {"class": 4, "name": "e", "images": 0} | dict.fromkeys(
        ("average_precision", "threshold", "precision", "recall", "f1")
    )


def test_scores_fit_80_columns_and_of_many_classes_the_worst_and_the_best_are_shown():
    row = {"images": 12345, "average_precision": 0.5, "threshold": 0.5, "precision": 1.0, "recall": 1.0}
    many = [{**row, "name": f"{i:02}" + "x" * 40, "average_precision": i / 30} for i in range(30)]
    found = {"mean_average_precision": 1.0, "accuracy": 1.0, "loss": 0.5, "per_class": many}
    lines = as_text(found).splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line[:2] for line in lines if "12,345" in line]
    assert shown == [f"{i:02}" for i in [*range(10), *range(29, 19, -1)]]


def test_thresholds_are_a_number_or_those_of_a_file_with_the_same_classes(tmp_path):
    assert read_thresholds("0.3", ["a", "b"]) == [0.3, 0.3]
    file = tmp_path / "scores.json"
    rows = [{"name": "a", "threshold": 0.2}, {"name": "b", "threshold": None}]
    file.write_text(json.dumps({"per_class": rows}))
    assert read_thresholds(str(file), ["a", "b"]) == [0.2, 0.5]
    for text, message in {
        "1.5": "threshold 1.5 is not from 0 to 1",
        "nan": "threshold nan is not from 0 to 1",
        "none.json": "threshold 'none.json' is neither a number nor a scores.json",
        str(tmp_path): "is neither a number nor",
    }.items():
        with pytest.raises(UserError, match=message):
            read_thresholds(text, ["a", "b"])
    for content in (
        [],
        {"per_class": 3},
        {"per_class": [{"name": "a"}]},
        {"per_class": [{"name": [], "threshold": 1}]},
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="is neither a number nor a scores.json"):
            read_thresholds(str(file), ["a", "b"])
    for other in ([{"name": "a", "threshold": 0.2}], [*rows[:1], {"name": "b", "threshold": 2}]):
        file.write_text(json.dumps({"per_class": other}))
        with pytest.raises(UserError, match="does not have the thresholds of this model's classes"):
            read_thresholds(str(file), ["a", "b"])


# --- the config, and the update


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"loss": "softmax"},
            "loss='softmax' is for one label .* 'digits' may have several: set --config.loss=",
        ),
        ({"augment.label_smoothing": 0.1}, "augment.label_smoothing=0.1 is for one label"),
        ({"class_weights": "balanced"}, "class_weights='balanced' are for one label"),
        (
            {"best_by": "balanced_accuracy"},
            "best_by='balanced_accuracy' is for .*: use mean_average_precision",
        ),
    ],
)
def test_what_is_for_one_label_per_image_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        check_labels(config_with(**{"loss": "sigmoid", **values}), multi_label=True)
    check_labels(config_with(**values), multi_label=False)


def test_average_precision_is_for_several_labels():
    with pytest.raises(UserError, match="best_by='mean_average_precision' is for images with several labels"):
        check_labels(config_with(best_by="mean_average_precision"), multi_label=False)


def multi_hot_batch():
    labels = np.random.default_rng(1).integers(0, 2, (8, CLASSES), dtype=np.uint8)
    labels[0] = 0
    return {**tiny_batch(), "label": labels}


def test_mixed_images_have_the_labels_of_both_in_the_proportion_of_the_mix():
    batch, preprocess = multi_hot_batch(), config_with().preprocess.to_dict()
    arguments = {"num_classes": CLASSES, "preprocess": preprocess}
    images, labels = augment.augment(jax.random.key(0), batch["image"], batch["label"], **arguments)
    np.testing.assert_array_equal(labels, np.float32(batch["label"]))
    mixed_images, mixed = augment.augment(
        jax.random.key(0), batch["image"], batch["label"], **arguments, mixup_alpha=1.0
    )
    before = np.roll(images, 1, axis=0)
    share = (np.asarray(mixed_images) - before).sum((1, 2, 3)) / (images - before).sum((1, 2, 3))
    expected = share[:, None] * labels + (1 - share[:, None]) * np.roll(labels, 1, axis=0)
    np.testing.assert_allclose(mixed, expected, atol=1e-3)


@pytest.fixture(scope="module")
def tiny():
    """Returns the parts of a tiny Mixer with the sigmoid loss, and a batch of images with several labels."""
    config = config_with(loss="sigmoid")
    model = tiny_model(config)
    schedule = make_schedule(config, total_steps=10, warmup_steps=0)
    optimizer = make_optimizer(config, schedule)
    state = fill(jax.eval_shape(lambda: start(model, optimizer, config)))
    update = make_train_step(model, optimizer, schedule, config, mesh=MESH, multi_label=True)
    return config, model, state, update, multi_hot_batch()


def test_the_loss_and_the_accuracy_of_an_update_are_over_all_classes(tiny, quick_to_compile):
    config, model, state, update, batch = tiny
    _, found = jax.jit(update)(state, batch)
    scores, _ = label_scores(
        one_batch_late(
            jax.jit(make_multi_label_step(model, config, mesh=MESH)), state.params, [batch], mesh=MESH
        )
    )
    logits = np.float64(model.apply({"params": state.params}, np.float32(batch["image"]) / 127.5 - 1))
    each = np.log1p(np.exp(-np.where(batch["label"] > 0, logits, -logits)))
    right = ((logits > 0) == (batch["label"] > 0)).all(axis=1)
    for loss, accuracy in ((found["loss"], found["accuracy"]), (scores["loss"], scores["accuracy"])):
        assert float(loss) == pytest.approx(each.sum(axis=1).mean(), rel=1e-5)
        assert float(accuracy) == pytest.approx(right.mean())
    theirs = metrics.average_precision_score(batch["label"], logits)
    assert scores["mean_average_precision"] == pytest.approx(theirs)


def test_padding_counts_nothing_and_chunks_give_the_same_rows(tiny, quick_to_compile):
    config, model, state, _, batch = tiny
    step = jax.jit(make_multi_label_step(model, config, mesh=MESH))
    padded = [
        {**batch, "mask": np.arange(8) < 5},
        {**batch, "mask": np.arange(8) >= 5},
        {**batch, "mask": np.zeros(8, bool)},
    ]
    whole = label_scores(one_batch_late(step, state.params, [batch], mesh=MESH))
    parts = label_scores(one_batch_late(step, state.params, padded, mesh=MESH))
    assert parts[0] == pytest.approx(whole[0])
    chunked = config_with(loss="sigmoid", reproducible=4)
    step = jax.jit(make_multi_label_step(model, chunked, mesh=MESH))
    assert label_scores(one_batch_late(step, state.params, padded, mesh=MESH))[0] == pytest.approx(whole[0])


# --- from a table to sets

QUARTERS = ("ne", "nw", "se", "sw")
TINY = [
    *(
        "--config.preprocess.image_size_px=8",
        "--config.model.patches.size=4,4",
        "--config.model.hidden_dim=16",
    ),
    *("--config.model.num_blocks=1", "--config.model.channels_mlp_dim=16", "--config.model.tokens_mlp_dim=8"),
    *("--config.total_epochs=12", "--config.batch_size=16", "--config.optimizer.learning_rate=0.02"),
    *(
        "--config.augment.min_crop_area=1",
        "--config.augment.flip=false",
        "--config.augment.randaugment_layers=0",
    ),
    *("--config.augment.mixup_alpha=0.2", "--config.augment.cutmix_alpha=0", "--config.eval_every_epochs=4"),
]


def write_quarters(root, name, count=140):
    """Writes images of which some quarters are bright, and a table of which ones; returns its rows."""
    random, rows = np.random.default_rng(0), []
    (root / "images").mkdir()
    for number in range(count):
        bright = random.random(4) < 0.4
        pixels = random.integers(0, 60, (8, 8)) + 150 * np.kron(
            bright[[1, 0, 3, 2]].reshape(2, 2), np.ones((4, 4), int)
        )
        (root / "images" / f"{number}.png").write_bytes(encode(pixels.astype(np.uint8)))
        labels = "|".join(name for name, yes in zip(QUARTERS, bright, strict=True) if yes)
        rows.append((f"images/{number}.png", labels, "train" if number < 100 else "validation"))
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows([("file", "labels", "split"), *rows])
    return rows


@pytest.mark.slow
def test_a_table_is_followed_from_training_to_sets_of_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = write_quarters(tmp_path, "scenes.csv")
    printed = []
    for command in commands_below("labels.md", "Several labels per image"):
        program, arguments = words_of(command)
        assert run(program, [*arguments, *(TINY if program == "train" else [])]) == 0, capsys.readouterr().err
        printed.append(capsys.readouterr().out)
    trained, evaluated, listed, sets = printed
    assert "training images per class: ne: " in trained and "mean average precision 0." in trained
    found = json.loads((tmp_path / "runs/scenes/evaluation/scores.json").read_text())
    logged = [json.loads(line) for line in (tmp_path / "runs/scenes/metrics.jsonl").read_text().splitlines()]
    reported = [row["validation/mean_average_precision"] for row in logged if "validation/loss" in row]
    assert found["mean_average_precision"] == pytest.approx(max(reported), abs=1e-6) and max(reported) > 0.7
    assert f"best: validation mean average precision {max(reported):.2%}" in trained
    assert f"mean average precision   {max(reported):.2%}" in evaluated
    assert [row["name"] for row in found["per_class"]] == [*QUARTERS]

    predicted = {
        row["file"]: [score["class_name"] for score in row["top"]]
        for row in map(json.loads, sets.splitlines())
    }
    assert len(predicted) == 140
    for quarter, row in zip(QUARTERS, found["per_class"], strict=True):
        true = [quarter in labels.split("|") for file, labels, split in rows if split == "validation"]
        said = [quarter in predicted[file] for file, _, split in rows if split == "validation"]
        assert metrics.f1_score(true, said) == pytest.approx(row["f1"])
    assert "(none)" in listed  # some images have no bright quarter

    model = load("runs/scenes")
    (prediction,) = model.predict("images/0.png", top=4)
    names = [score.class_name for score in as_set(prediction, [0.5] * 4).top]
    assert model.multi_label and names == [
        score.class_name for score in prediction.top if score.probability >= 0.5
    ]
    assert run("predict", ["--workdir=runs/scenes", "--csv", "--threshold=1", "images/0.png"]) == 0
    assert [*csv.reader(io.StringIO(capsys.readouterr().out))][1] == ["images/0.png", "", "", "", ""]
    assert run("analyze", ["fewshot", "--workdir=runs/scenes"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: fewshot needs one label per image, but images of 'table:")
    assert error.endswith("scenes.csv' may have several: choose another dataset\n")

    # With other labels the run does not continue.
    text = (tmp_path / "scenes.csv").read_text()
    (tmp_path / "scenes.csv").write_text(text.replace(rows[0][1] + ",", "se,", 1))
    config = json.loads((tmp_path / "runs/scenes/config.json").read_text())
    assert config["loss"] == "sigmoid" and config["dataset"] == f"table:{tmp_path / 'scenes.csv'}"
    assert run("train", ["scenes.csv", "--workdir=runs/scenes", *TINY]) == 2
    assert "the same images in another order, or with other labels" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_with_the_rows_of_a_folder_gives_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file, labels, split in write_quarters(tmp_path, "scenes.csv", count=60):
        place = tmp_path / "photos" / split / (labels.split("|")[0] or "dark")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "photos" / "validation")
    folder = read_folder("photos")
    rows = [
        (one.file, *one.classes, split) for split in ("train", "validation") for one in folder.splits[split]
    ]
    with (tmp_path / "photos" / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "split"), *rows])
    (command,) = commands_below("labels.md", "Labels in a table")
    assert words_of(command)[1][0] == "labels.csv"
    found = []
    for source in ("photos", "photos/labels.csv"):
        workdir = tmp_path / source.replace("/", "-")
        assert run("train", [source, f"--workdir={workdir}", *TINY, "--config.total_steps=8"]) == 0, (
            capsys.readouterr().err
        )
        logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        found.append([{key: row[key] for key in row if "/" in key} for row in logged])
    assert found[0] == found[1] and "validation/balanced_accuracy" in found[0][-1]
