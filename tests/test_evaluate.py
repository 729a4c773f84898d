"""Scores of a split are means over its images for any batch size; the program writes them to files."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.evaluate import default_output, main
from mlpmixer_flax.export import export
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.scores import open_split, score_images
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.evaluation import class_scores, evaluate, make_eval_step, one_batch_late
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.weights.source import NamedRun

CLASSES = 8
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time here


@cache
def tiny():
    """Returns a model, a jitted eval_step, parameters without zeros, and images and labels of a split of 10 images."""
    config = get_config()
    config.update_from_flattened_dict(
        {
            "model.patches.size": (4, 4),
            "model.hidden_dim": 8,
            "model.num_blocks": 1,
            "model.tokens_mlp_dim": 6,
            "model.channels_mlp_dim": 10,
        }
    )
    config = resolve(config, {})
    model = MlpMixer(num_classes=CLASSES, **config.model.to_dict())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(p.dtype) + (p.ndim == 1), shapes)
    params = jax.tree.map(np.float32, params)
    images = rng.integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, 10, dtype=np.int32)
    return (
        model,
        jax.jit(make_eval_step(model, config, mesh=sharding.make_mesh()), compiler_options=QUICK),
        params,
        images,
        labels,
    )


def batches(images, labels, *, size, order=slice(None)):
    """Yields batches of one size; the last one is padded with white images of label 0."""
    images, labels = images[order], labels[order]
    for i in range(0, len(images), size):
        pad = size - len(images[i : i + size])
        yield {
            "image": np.pad(images[i : i + size], ((0, pad), (0, 0), (0, 0), (0, 0)), constant_values=255),
            "label": np.pad(labels[i : i + size], (0, pad)),
            "mask": np.arange(size) < size - pad,
        }


@cache
def by_hand():
    model, _, params, images, labels = tiny()
    apply = jax.jit(lambda x: model.apply({"params": params}, x), compiler_options=QUICK)
    logits = np.float64(apply(np.float32(images) / 127.5 - 1))
    own = logits[np.arange(10), labels][:, None]
    rank = (logits > own).sum(1)
    return {
        "loss": (np.log(np.exp(logits).sum(1)) - own[:, 0]).mean(),
        "accuracy": (rank == 0).mean(),
        "balanced_accuracy": np.mean([(rank[labels == label] == 0).mean() for label in set(labels)]),
        "accuracy_top5": (rank < 5).mean(),
    }


@pytest.mark.parametrize("size", [1, 4, 10, 16])  # of 10 images; 4 leaves 2 in the last batch
def test_scores_are_means_over_the_images_for_any_batch_size(size):
    _, eval_step, params, images, labels = tiny()
    scores = evaluate(eval_step, params, batches(images, labels, size=size), mesh=sharding.make_mesh())
    assert scores.keys() == by_hand().keys()
    assert all(type(value) is float for value in scores.values())
    for name, value in by_hand().items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=name)


def test_sums_are_divided_by_the_size_of_the_split():
    _, eval_step, params, images, labels = tiny()
    mesh = sharding.make_mesh()
    first, rest = (
        evaluate(eval_step, params, batches(images, labels, size=4, order=part), mesh=mesh)
        for part in (slice(0, 7), slice(7, 10))
    )
    for name, value in by_hand().items():
        if name == "balanced_accuracy":  # every class counts the same, however many of its images a part has
            continue
        np.testing.assert_allclose(0.7 * first[name] + 0.3 * rest[name], value, rtol=1e-5, err_msg=name)


def test_the_split_can_tell_right_scores_from_wrong_ones():
    """A constant, or counting the padding, would not give the scores above."""
    expected = by_hand()
    assert 0 < expected["accuracy"] < expected["accuracy_top5"] < 1
    _, eval_step, params, images, labels = tiny()
    counted = [{**b, "mask": np.ones(4, bool)} for b in batches(images, labels, size=4)]
    scores = evaluate(eval_step, params, counted, mesh=sharding.make_mesh())
    assert abs(scores["loss"] - expected["loss"]) > 0.01


def test_the_order_of_images_and_batches_does_not_matter():
    _, eval_step, params, images, labels = tiny()
    order = np.random.default_rng(1).permutation(10)
    shuffled = list(batches(images, labels, size=4, order=order))[::-1]  # the padded batch comes first
    scores = evaluate(eval_step, params, shuffled, mesh=sharding.make_mesh())
    for name, value in by_hand().items():
        np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=name)


def test_a_batch_of_padding_only_changes_nothing():
    """If several processes share a split, one may run out of images before the others."""
    _, eval_step, params, images, labels = tiny()
    real = list(batches(images, labels, size=4))
    empty = {**real[0], "mask": np.zeros(4, bool)}
    mesh = sharding.make_mesh()
    assert evaluate(eval_step, params, [empty, *real, empty], mesh=mesh) == evaluate(
        eval_step, params, real, mesh=mesh
    )


def test_the_given_parameters_are_used():
    _, eval_step, params, images, labels = tiny()
    zeros = jax.tree.map(np.zeros_like, params)
    scores = evaluate(eval_step, zeros, batches(images, labels, size=4), mesh=sharding.make_mesh())
    np.testing.assert_allclose(scores["loss"], np.log(CLASSES), rtol=1e-5)
    # If logits are equal, the lower class counts as better.
    assert scores["accuracy"] == pytest.approx((labels == 0).mean())
    assert scores["accuracy_top5"] == pytest.approx((labels < 5).mean())


def test_accuracy_per_class_is_over_its_images_and_nan_without_images():
    model, eval_step, params, images, labels = tiny()
    images, labels, mesh = images[:6], labels[:6], sharding.make_mesh()
    scores, by_class = class_scores(
        one_batch_late(eval_step, params, batches(images, labels, size=4), mesh=mesh)
    )
    assert scores == evaluate(eval_step, params, batches(images, labels, size=4), mesh=mesh)
    apply = jax.jit(lambda x: model.apply({"params": params}, x), compiler_options=QUICK)
    right = np.asarray(apply(np.float32(images) / 127.5 - 1)).argmax(-1) == labels
    seen = sorted(set(labels))
    assert 1 < len(seen) < CLASSES and 0 < right.sum() < 6
    np.testing.assert_allclose(by_class[seen], [right[labels == label].mean() for label in seen])
    assert scores["balanced_accuracy"] == pytest.approx(by_class[seen].mean())
    assert np.isnan(np.delete(by_class, seen)).all()


# --- the program

WORDS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory):
    """Returns a run that gets some images wrong, and whose EMA differs from its last weights."""
    return shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def evaluated(run):
    assert main([f"--workdir={run}"]) == 0
    return run / "evaluation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the test images of the digits as RGB files, in folders whose names sort in another order."""
    root = tmp_path_factory.mktemp("folders") / "digits"
    examples = open_examples("digits", "test")
    for i, (image, label) in enumerate(zip(examples.images, examples.labels, strict=True)):
        for split in ("train", "test"):
            file = root / split / WORDS[label] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).convert("RGB").save(file)
    return root


def read(output):
    return json.loads((output / "scores.json").read_text(encoding="utf-8"))


def test_scores_equal_those_that_training_reported(run, evaluated):
    """The scores are those of the best checkpoint, which is taken unless another is named."""
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "test/accuracy" in row]
    reported = max(rows, key=lambda row: (row["test/accuracy"], row["step"]))
    found = read(evaluated)
    assert found["step"] == reported["step"]
    assert 0.2 < found["accuracy"] < 1
    assert found["accuracy"] == reported["test/accuracy"]
    assert found["accuracy_top5"] == reported["test/accuracy_top5"]
    assert found["loss"] == pytest.approx(reported["test/loss"], rel=1e-5)


def test_the_files_agree_with_each_other(run, evaluated):
    found = read(evaluated)
    of = {"model": str(run), "checkpoint": "best", "step": 40, "dataset": "digits", "split": "test"}
    assert of.items() <= found.items()
    assert found["images"] == len(open_examples("digits", "test"))
    assert sum(row["images"] for row in found["per_class"]) == found["images"]
    assert sum(images for _, _, images in found["confusion"]) == found["images"]
    right = sum(images for true, predicted, images in found["confusion"] if true == predicted)
    assert right / found["images"] == found["accuracy"]
    with (evaluated / "per_class.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [str(i) for i in range(10)]
    for name in ("precision", "recall", "f1"):
        assert [float(row[name]) for row in rows] == [row[name] for row in found["per_class"]]
    assert found["balanced_accuracy"] == pytest.approx(np.mean([row["recall"] for row in found["per_class"]]))
    for name in ("confusion", "mistakes", "calibration"):
        with Image.open(evaluated / f"{name}.png") as picture:
            assert picture.width == 1200


def test_every_image_is_scored_once_and_in_order_for_any_batch_size(run):
    model = load_run(run)
    examples, classes = open_split(model, "digits", "test")
    labels = open_examples("digits", "test").labels
    one, other = (score_images(model, examples, classes=classes, batch_size=n) for n in (50, 400))
    np.testing.assert_array_equal(one["label"], labels)
    np.testing.assert_array_equal(one["best"], other["best"])
    np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-4, atol=1e-6)
    # With softmax, if the prediction is right, the confidence is the probability of the true class.
    right = one["best"][:, 0] == labels
    np.testing.assert_allclose(one["confidence"][right], np.exp(-one["loss"][right]), rtol=1e-4)
    assert one["best"].shape == (len(labels), 5)


def test_a_folder_is_matched_by_name_and_read_in_gray(run, evaluated, folder, tmp_path, capsys):
    named = tmp_path / "run"
    shutil.copytree(run, named)
    (named / "class_names.json").write_text(json.dumps(WORDS))
    assert main([f"--workdir={named}", f"--dataset=folder:{folder}", f"--output={tmp_path / 'out'}"]) == 0
    found, expected = read(tmp_path / "out"), read(evaluated)
    assert [row["name"] for row in found["per_class"]] == WORDS
    for key in ("images", "accuracy", "accuracy_top5"):
        assert found[key] == expected[key]
    assert sorted(found["confusion"]) == sorted(expected["confusion"])
    wrong = found["mistakes"]
    assert len(wrong) == round((1 - found["accuracy"]) * found["images"])
    assert all(
        row["file"].split("/")[:2] == ["test", row["is"]] and row["said"] != row["is"] for row in wrong
    )
    assert [row["confidence"] for row in wrong] == sorted((row["confidence"] for row in wrong), reverse=True)
    assert all(row["file"] is None for row in expected["mistakes"])
    shown = capsys.readouterr().out
    assert f"top-1 accuracy     {found['accuracy']:>8.2%}" in shown
    table = shown[shown.index("\nclass") :].splitlines()
    assert len([line for line in table if line.split()[:1] and line.split()[0] in WORDS]) == 10


OWN = {"checkpoint": "best", "dataset": "digits", "split": "test"}
OTHERS = [
    ({"split": "train"}, "evaluation-train"),
    ({"split": "train+test"}, "evaluation-train+test"),
    ({"checkpoint": "last"}, "evaluation-last"),
    ({"checkpoint": "30", "split": "train"}, "evaluation-train-step30"),
    ({"dataset": "cifar10"}, "evaluation-cifar10"),
    ({"split": "test[:5]"}, "evaluation-test_5-......"),
    ({"split": "test[5:]"}, "evaluation-test_5-......"),
    ({"dataset": "folder:/a/photos"}, "evaluation-photos-......"),
    ({"dataset": "folder:/b/photos"}, "evaluation-photos-......"),
    ({"dataset": f"folder:/{'数' * 80}", "split": "train"}, f"evaluation-{'数' * 13}-......-train"),
    ({"dataset": "folder:/bad\udcff\n\x1b[31m"}, "evaluation-bad_31m-......"),
    ({"dataset": "folder:/"}, "evaluation-folder-......"),
]


def test_scores_of_something_else_have_a_directory_of_their_own(run):
    model, named = load_run(run), NamedRun(run, None)
    own = {**OWN, "model": str(run)}
    assert default_output(own, model, named) == run / "evaluation"
    names = [default_output({**own, **changes}, model, named) for changes, _ in OTHERS]
    for name, (_, expected) in zip(names, OTHERS, strict=True):
        assert name.parent == run and re.fullmatch(expected.replace("+", "[+]"), name.name), name
    weights = [{**own, "model": name, "checkpoint": None} for name in ("w.npz", "a/w.npz", "~/w.npz")]
    names += [default_output(subject, load_run(run), None) for subject in weights]
    assert str(names[-3]) == "evaluation-w.npz-digits-test"
    assert all(re.fullmatch("evaluation-w.npz-......-digits-test", str(name)) for name in names[-2:])
    assert len(set(names)) == len(OTHERS) + 3 and max(len(os.fsencode(name.name)) for name in names) < 200


def test_scores_of_something_else_replace_nothing_and_say_what_they_are_of(run, evaluated, capsys):
    before = (evaluated / "scores.json").read_bytes()
    assert main([f"--weights={run}@last", "--split=test[:40]"]) == 0
    assert (evaluated / "scores.json").read_bytes() == before
    (output,) = run.glob("evaluation-test_40-*-last")
    assert f"\nin {output}:\n" in capsys.readouterr().out
    of = {"checkpoint": "last", "step": 40, "dataset": "digits", "split": "test[:40]", "images": 40}
    assert of.items() <= read(output).items()


@pytest.mark.slow
def test_a_model_of_five_classes_has_no_top_5_and_files_may_have_any_name(
    run, folder, tmp_path, monkeypatch, capsys
):
    model = load_run(run)
    head = {name: values[..., :5] for name, values in model.params["head"].items()}
    five = dataclasses.replace(
        model,
        module=model.module.clone(num_classes=5),
        params={**model.params, "head": head},
        class_names=tuple(WORDS[:5]),
    )
    export(five, tmp_path / "w.npz", format="npz")
    photos = tmp_path / "photos"
    names = [b"bad\xff", b"new\nline", "\N{GRINNING FACE}".encode(), b"-x", b"x" * 200, b"\x1b[31m"]
    for word, other in zip(WORDS[:5], WORDS[1:6], strict=True):  # so nearly all predictions are mistakes
        files = sorted((folder / "test" / other).iterdir())
        for split in (b"train", b"test"):
            place = os.path.join(os.fsencode(photos), split, word.encode())
            os.makedirs(place)
            for file, name in zip(files, names, strict=False):
                shutil.copy(os.fsencode(file), os.path.join(place, name + b".png"))
    monkeypatch.chdir(tmp_path)
    assert main(["--weights=w.npz", "--dataset=folder:photos"]) == 0
    (output,) = tmp_path.glob("evaluation-w.npz-photos-*-test")
    found = read(output)
    assert found["dataset"] == f"folder:{photos}" and found["images"] == 30
    assert "accuracy_top5" not in found and "top-5" not in capsys.readouterr().out
    assert found["mistakes"] and all((photos / row["file"]).exists() for row in found["mistakes"])
    assert any("\udcff" in row["file"] for row in found["mistakes"])


def test_class_names_that_are_not_text_are_written_with_escapes(run, tmp_path):
    named = tmp_path / "run"
    shutil.copytree(run, named)
    names = [f"bad\udcff\n{word}" for word in WORDS]
    (named / "class_names.json").write_text(json.dumps(names))
    assert main([f"--workdir={named}", "--split=test[:40]", f"--output={tmp_path}/new\udcff/out"]) == 0
    output = tmp_path / "new\udcff" / "out"
    assert [row["name"] for row in read(output)["per_class"]] == names
    text = (output / "per_class.csv").read_text(encoding="utf-8")
    assert [row["name"] for row in csv.DictReader(io.StringIO(text, newline=""))] == [
        name.replace("\udcff", "\\udcff") for name in names
    ]


@pytest.mark.parametrize(
    ("output", "message"), [("https://a.b/scores", "'https://a.b/scores' is a URL"), ("", "it is empty")]
)
def test_an_output_that_is_no_path_is_refused_before_anything_is_read(
    output, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--workdir=nowhere", f"--output={output}"])
    assert stop.value.code == 2 and f"argument --output: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_nothing_is_written(run, folder, tmp_path, capsys):
    others = tmp_path / "photos"
    for name in [*WORDS[:9], "ten"]:
        (others / name).mkdir(parents=True)
        shutil.copy(next((folder / "test" / "one").iterdir()), others / name)
    blocked = tmp_path / "file"
    blocked.touch()
    renamed = tmp_path / "run"
    shutil.copytree(run, renamed)
    (renamed / "class_names.json").write_text(json.dumps(WORDS))
    for arguments, message in [
        (
            [f"--workdir={renamed}", f"--dataset=folder:{others}", "--split=train"],
            "the model has no class named 'ten'; the dataset has 10 classes, the model 10 such as 'zero'",
        ),
        (["--weights=gsam/Mixer-S_32"], "gsam/Mixer-S_32 is not a run and has no dataset .*: give --dataset"),
        ([f"--workdir={run}", "--split=tset"], "split 'tset' of dataset 'digits' cannot be read"),
        ([f"--workdir={run}", "--batch_size=0"], "batch_size=0 must be at least 1"),
        ([f"--workdir={run}", f"--output={blocked}"], "cannot write to .*file"),
    ]:
        assert main([f"--output={tmp_path / 'out'}", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.match(f"error: .*{message}", error) and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
