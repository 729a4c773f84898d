"""Distillation: the loss, the images that teacher and model see, and real runs that learn from a run."""

import json
import shutil
import time

import chex
import jax
import numpy as np
import pytest
from several_processes import arguments, finish, start_all, state_at
from small_runs import rows
from tiny_updates import (
    CLASSES,
    DESCENT,
    MESH,
    MIXED,
    SHIFTED,
    config_with,
    log_softmax,
    start,
    tiny_batch,
    tiny_model,
)

from mlpmixer_flax import UserError
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.train import main
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.distillation import divergence, load_teacher
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.setup import settle
from mlpmixer_flax.training.step import TrainState, make_train_step
from mlpmixer_flax.training.validate import validate
from mlpmixer_flax.weights.files import write_npz

# --- the loss


def divergence_by_hand(name, logits, taught, temperature):
    """The definition: the sum of p log(p / q) over the classes; with sigmoid, over both answers for each class."""
    logits, taught = np.float64(logits) / temperature, np.float64(taught) / temperature
    if name == "softmax":
        log_p, log_q = log_softmax(taught), log_softmax(logits)
    else:
        log_p, log_q = (-np.logaddexp(0, np.concatenate([-x, x], -1)) for x in (taught, logits))
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_equals_its_definition(name, temperature):
    logits, taught = np.random.default_rng(0).normal(0, 3, (2, 6, 5)).astype(np.float32)
    found = divergence(logits, taught, loss=LOSSES[name], temperature=temperature)
    np.testing.assert_allclose(
        found, divergence_by_hand(name, logits, taught, temperature), rtol=1e-4, atol=1e-5
    )
    assert min(found) > 0.1
    same = divergence(taught, taught, loss=LOSSES[name], temperature=temperature)
    np.testing.assert_array_equal(same, np.zeros(6))


# --- the update


def make_update(**values):
    config = config_with(**DESCENT, **values)
    model, schedule = tiny_model(config), make_schedule(config, total_steps=10, warmup_steps=0)
    optimizer = make_optimizer(config, schedule)
    rng = np.random.default_rng(0)
    like = jax.eval_shape(lambda: start(model, optimizer, config))
    student, teacher = (
        jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(p.dtype), like.params) for _ in range(2)
    )
    state = TrainState(np.int32(0), student, optimizer.init(student), None)
    update = make_train_step(model, optimizer, schedule, config, mesh=MESH, teacher=tiny_model(config))
    return jax.jit(update), state, teacher, model


def test_only_the_model_learns_and_only_from_the_teacher(quick_to_compile):
    """Compares the loss, and the change of the head's bias, with their formulas; labels change the accuracy only."""
    update, state, teacher, model = make_update(distill_temperature=2.0, accumulation_steps=4)
    batch = tiny_batch()
    after, metrics = update(state, batch, teacher)
    images = np.float32(batch["image"]) / 127.5 - 1
    logits, taught = (np.float64(model.apply({"params": p}, images)) for p in (state.params, teacher))
    expected = divergence_by_hand("softmax", logits, taught, 2.0).mean()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4) and expected > 0.01
    gradient = 2 * (np.exp(log_softmax(logits / 2)) - np.exp(log_softmax(taught / 2))).mean(0)
    np.testing.assert_allclose(
        after.params["head"]["bias"], state.params["head"]["bias"] - 0.1 * gradient, rtol=1e-4, atol=1e-6
    )
    other = {**batch, "label": (batch["label"] + 1) % CLASSES}
    again, of_other = update(state, other, teacher)
    chex.assert_trees_all_equal(again, after)
    assert of_other["loss"] == metrics["loss"] and of_other["accuracy"] != metrics["accuracy"]


def test_a_model_that_equals_its_teacher_has_nothing_to_learn_whatever_the_augmentation(quick_to_compile):
    """The loss is only 0 if both see the same pixels in the same order, and the teacher's dropout is off."""
    mixed = {**SHIFTED, **MIXED, "augment.label_smoothing": 0.0, "augment.erase_probability": 0.5}
    update, state, _, _ = make_update(**mixed, accumulation_steps=2)
    after, metrics = update(state, tiny_batch(), state.params)
    assert float(metrics["loss"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["gradient_norm"]) < 1e-6
    dropping, *_ = make_update(**mixed, **{"model.dropout_rate": 0.5}, accumulation_steps=2)
    assert float(dropping(state, tiny_batch(), state.params)[1]["loss"]) > 1e-3  # only the model drops


# --- whole runs

STUDENT = {
    "model.hidden_dim": 8,
    "model.channels_mlp_dim": 16,
    "model.num_blocks": 1,
    "model.dropout_rate": 0.1,
    "augment.mixup_alpha": 0.0,  # slow to compile
    "augment.crop_padding_px": 1,
    "accumulation_steps": 2,
    "optimizer.name": "sgd",  # as in test_processes.py
    "optimizer.learning_rate": 0.03,
    "schedule.name": "constant",
    "distill_temperature": 2.0,
    "total_steps": 400,
    "log_every_steps": 20,
    "eval_every_epochs": 0.0,
    "save_every_steps": 100,
    "keep_checkpoints": 20,
}


def options(teacher, workdir, **changes):
    return [*arguments({**STUDENT, "distill_from": teacher, **changes}), f"--workdir={workdir}"]


def run(teacher, workdir, *, devices=1, kill_at=None, **changes):
    """Trains in a process of its own; kills it when it has saved this step."""
    (process,) = start_all(
        1,
        "train",
        *options(teacher, workdir, **changes),
        environment=lambda index: {"JAX_NUM_CPU_DEVICES": str(devices)},
    )
    while kill_at and process.poll() is None:
        if (workdir / "checkpoints" / str(kill_at)).exists():
            process.kill()
        time.sleep(0.005)
    (status,), (text,), (error,) = finish([process])
    assert status == (-9 if kill_at else 0), error
    return text


@pytest.fixture(scope="module")
def whole(digits_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("distilled") / "whole"
    assert "learns the predictions of " in run(digits_run, workdir)
    return workdir


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits_also_if_its_teacher_has_moved(whole, digits_run, tmp_path):
    workdir, moved = tmp_path / "killed", tmp_path / "teacher"
    run(digits_run, workdir, kill_at=100)
    shutil.copytree(digits_run, moved)
    text = run(moved, workdir)
    assert "continuing from step " in text and f"distill_from={moved} (was {digits_run})" in text
    expected, found = state_at(whole, 400), state_at(workdir, 400)
    assert expected.keys() == found.keys() and not [name for name in found if "teacher" in name]
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.long
@pytest.mark.slow
def test_two_devices_that_share_the_teacher_train_like_one(whole, digits_run, tmp_path):
    run(digits_run, tmp_path / "two", devices=2, **{"mesh.fsdp": 2})
    losses = [
        [row["train/loss"] for row in rows(each) if "train/loss" in row] for each in (whole, tmp_path / "two")
    ]
    assert len(losses[0]) == 20 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
def test_a_run_does_not_continue_with_another_teacher(whole, digits_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = {file: file.read_bytes() for file in workdir.iterdir() if file.is_file()}
    assert main(options(f"{digits_run}@10", workdir, total_steps=500)) == 2
    error = capsys.readouterr().err
    assert f"error: the teacher of the run in {workdir} has other weights than when the run began: " in error
    assert f"--config.init_from={workdir} and another --workdir" in error
    assert main(options("", workdir, total_steps=500, distill_temperature=1.0)) == 2
    assert f"holds a run with another config (distill_from was '{digits_run}', is " in capsys.readouterr().err
    (workdir / "data.json").unlink()
    assert main(options(f"{digits_run}@20", workdir, total_steps=500)) == 2
    assert f"holds a run with another config (distill_from was '{digits_run}', is " in capsys.readouterr().err
    del before[workdir / "data.json"]
    assert before == {file: file.read_bytes() for file in workdir.iterdir() if file.is_file()}


def write_teacher(file, *, num_classes=10, channels=1, size_px=8, **changes):
    """Writes random weights of a small Mixer whose metadata fit a run on the digits, except for the changes."""
    model = MlpMixer(
        num_classes, {"size": (2, 2)}, hidden_dim=4, num_blocks=1, tokens_mlp_dim=4, channels_mlp_dim=4
    )
    images = np.zeros((1, size_px, size_px, channels), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    names = [str(digit) for digit in range(num_classes)]
    known = {
        "model": {},
        "preprocess": {"mean": [0.5], "std": [0.5]},
        "class_names": names,
        "loss": "softmax",
    }
    write_npz(file, jax.device_get(params), metadata={**known, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "has 7 classes, but the data has 10: choose a teacher with the same classes"),
        (
            {"class_names": [*"9876543210"]},
            "has the class '9' where the data has '0': choose a teacher with the same classes",
        ),
        ({"class_names": [*"012345678"]}, "has 9 class names for 10 classes: choose a teacher with the same"),
        (
            {"channels": 3},
            "is a model for images of 3 channels, but those of 'digits' have 1: choose another teacher",
        ),
        (
            {"size_px": 16},
            "was trained with preprocess.image_size_px=16, but this run has 8, and a teacher sees the same images: set "
            "--config.preprocess.image_size_px=16, or choose another teacher",
        ),
        (
            {"preprocess": {"mean": [0.25], "std": [0.5]}},
            "was trained with preprocess.mean=(0.25,), but this run has (0.5,), and a teacher sees the same images: set "
            "--config.preprocess.mean=0.25, or choose another teacher",
        ),
        (
            {"preprocess": {"mean": [0.5], "std": [1.0]}},
            "--config.preprocess.std=1.0, or choose another teacher",
        ),
        ({"loss": "sigmoid"}, "was trained with loss='sigmoid', but this run has 'softmax', and "),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, capsys, changes, message
):
    write_teacher(tmp_path / "w.npz", **changes)
    assert main(options(tmp_path / "w.npz", tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: distill_from='{tmp_path}/w.npz' ") and message in line
    assert [file.name for file in tmp_path.iterdir()] == ["w.npz"]


def test_a_teacher_that_does_not_exist_is_refused_like_other_weights(tmp_path, capsys):
    assert main(options("runs/techer", tmp_path / "run")) == 2
    assert "error: no weights 'runs/techer': not a published name, file" in capsys.readouterr().err


def teacher_with(digits_run, folder, *, without=(), **changes):
    """Copies a run and changes sections of its config; returns its module as `load_teacher` does."""
    teacher = shutil.copytree(digits_run, folder)
    stored = json.loads((digits_run / "config.json").read_text())
    for section, values in changes.items():
        stored[section] |= values
    for section, key in without:
        del stored[section][key]
    (teacher / "config.json").write_text(json.dumps(stored))
    config = settle(load_config("digits.py", {"distill_from": str(teacher)}), {})
    names = [str(digit) for digit in range(10)]
    return load_teacher(config, class_names=names, image_shape=(8, 8, 1)).module


def test_a_run_of_an_earlier_version_which_lacks_keys_can_teach(digits_run, tmp_path):
    whole = teacher_with(digits_run, tmp_path / "whole")
    lacking = [("preprocess", "mean"), ("preprocess", "std"), ("preprocess", "fit"), ("model", "gelu")]
    assert teacher_with(digits_run, tmp_path / "earlier", without=lacking) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"dtype": "float"}}, "the metadata of .*teacher is invalid: "),
        (
            {"preprocess": {"image_size_px": "8"}},
            "teacher contradicts itself: .* .preprocess.image_size_px.: restore",
        ),
        (
            {"without": [("preprocess", "image_size_px")]},
            "teacher contradicts itself: .* .preprocess.image_size_px.: ",
        ),
    ],
)
def test_a_run_whose_config_is_damaged_cannot_teach(digits_run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        teacher_with(digits_run, tmp_path / "teacher", **changes)


def test_a_temperature_without_a_teacher_is_refused():
    with pytest.raises(
        UserError, match="distill_temperature=4.0 has no effect without a teacher: set distill_from"
    ):
        validate(config_with(distill_temperature=4.0))


def test_several_resolutions_are_refused():
    with pytest.raises(
        UserError, match="because a teacher has one size: set --config.resolutions_px= .empty."
    ):
        validate(config_with(distill_from="runs/teacher", resolutions_px=(8, 16)))


def test_label_smoothing_which_would_have_no_effect_is_refused():
    with pytest.raises(
        UserError, match="augment.label_smoothing=0.1 has no effect with distill_from, because"
    ):
        validate(config_with(distill_from="runs/teacher", **{"augment.label_smoothing": 0.1}))
