"""Tests one model that is trained for several resolutions: the draw of sizes, gradients, scores, resuming, devices."""

import json
import re
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import ROOT, run, words_of
from flax.traverse_util import flatten_dict
from jax.test_util import check_grads
from several_processes import arguments, finish, start_all, state_at
from small_runs import rows

from mlpmixer_flax import UserError, fit, load, load_config
from mlpmixer_flax.evaluate import main as evaluate
from mlpmixer_flax.export import main as export
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.training.report import TIMINGS
from mlpmixer_flax.training.resolutions import ResizedMixer, models_by_size, size_of_update, split_sizes
from mlpmixer_flax.training.setup import initial_params, make_setup, settle, start_state
from mlpmixer_flax.weights.adapt import adapt
from mlpmixer_flax.weights.tokens import resampled, with_tokens

SIZES = (4, 8, 16)
CHANGES = {
    "resolutions_px": SIZES,
    "model.hidden_dim": 16,
    "model.channels_mlp_dim": 16,
    "model.num_blocks": 2,  # the model of `digits_run`
    "model.dropout_rate": 0.1,
    "augment.mixup_alpha": 0.0,  # slow to compile
    "augment.crop_padding_px": 1,
    "batch_size": 32,
    "accumulation_steps": 2,
    "ema_decay": 0.9,
    "optimizer.name": "sgd",  # not Adam: it makes full updates of parameters whose gradient is nothing but rounding
    "optimizer.learning_rate": 0.05,
    "optimizer.sam_rho": 0.02,
    "schedule.name": "constant",
    "total_steps": 12,
    "log_every_steps": 4,
    "eval_every_steps": 4,
    "save_every_steps": 4,
    "keep_checkpoints": 10,
}


def config_with(**changes):
    return load_config("digits.py", {**CHANGES, **changes})


def measured(workdir):
    """Returns the rows of metrics.jsonl without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows(workdir)]


# --- the draw


def sizes_drawn(**changes):
    config = config_with(**changes)
    return [size_of_update(config, step) for step in range(300)]


def test_sizes_are_a_function_of_seed_and_step_and_all_have_the_same_number_of_updates():
    draws = [sizes_drawn(seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    decks = [tuple(draws[0][first : first + 3]) for first in range(0, 300, 3)]
    assert all(sorted(deck) == [4, 8, 16] for deck in decks)
    assert len(Counter(decks)) == 6  # all orders come up, each about as often
    assert min(Counter(decks).values()) > 5


def test_the_order_in_which_sizes_are_given_changes_nothing_and_without_sizes_it_is_the_models_own():
    assert sizes_drawn(resolutions_px=(16, 8, 4)) == sizes_drawn()
    assert set(sizes_drawn(resolutions_px=())) == {8}


# --- the model at another size


@pytest.fixture(scope="module")
def mixer():
    """A Mixer for 8 px without dropout, and parameters of which none is zero, as float64."""
    model = MlpMixer(
        num_classes=3,
        patches={"size": (2, 2)},
        hidden_dim=6,
        num_blocks=2,
        tokens_mlp_dim=5,
        channels_mlp_dim=7,
        dtype="float64",
    )
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    return model, jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape), like)


@pytest.mark.parametrize("size_px", [4, 12])
def test_gradients_of_the_stored_weights_equal_finite_differences(mixer, size_px):
    model, params = mixer
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 1))
    with jax.enable_x64():
        resized = ResizedMixer(model, 8, size_px, interpolation="bilinear")

        @jax.jit
        def loss(params):
            return jnp.sum(resized.apply({"params": params}, images) ** 2)

        # The pooled features are float32 also here.
        check_grads(loss, (params,), order=1, modes=["rev"], rtol=0.01, atol=0.01, eps=1e-3)
        gradient = flatten_dict(jax.grad(loss)(params), sep="/")
    kernels = [array for name, array in gradient.items() if "token_mixing" in name and "kernel" in name]
    assert len(kernels) == 4 and all(np.abs(kernel).max() > 1e-3 for kernel in kernels)


@pytest.mark.parametrize("size_px", [4, 12])
def test_a_resized_mixer_computes_what_adapted_weights_do_with_resized_images(mixer, size_px):
    model = mixer[0].clone(dtype="float32")
    params = jax.tree.map(np.float32, mixer[1])
    images = np.float32(np.random.default_rng(1).normal(size=(2, 8, 8, 1)))
    resized = jax.image.resize(images, (2, size_px, size_px, 1), "bilinear")
    like = jax.eval_shape(model.init, jax.random.key(0), resized)["params"]
    flat = flatten_dict(params, sep="/")
    adapted, _ = adapt({name: array.shape for name, array in flat.items()}, flat.__getitem__, like)
    expected = model.apply({"params": adapted}, resized)
    found = ResizedMixer(model, 8, size_px, interpolation="bilinear").apply({"params": params}, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found - model.apply({"params": params}, images)).max() > 0.01


def test_resampling_is_the_same_in_numpy_and_in_jax(mixer):
    params, transforms = jax.tree.map(np.float32, mixer[1]), resampled((4, 4), (6, 6))
    in_jax = jax.jit(lambda params: with_tokens(params, transforms))(params)
    in_numpy = with_tokens(params, transforms)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), in_jax, in_numpy)
    assert in_numpy["MixerBlock_1"]["token_mixing"]["Dense_1"]["bias"].shape == (36,)


def test_at_its_own_size_the_model_is_the_model(mixer):
    assert models_by_size(mixer[0], settle(config_with(), {}))[8] is mixer[0]


# --- runs


@pytest.fixture(scope="module")
def compiled_between():
    """Names of what JAX compiles, noted from the start."""
    noted = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: (
            noted.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    return noted


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def flexible(tmp_path_factory, quick_to_compile, compiled_between):
    """A whole run; and how many programs had been compiled at each of its evaluations."""
    workdir, counts = tmp_path_factory.mktemp("flexible") / "run", []
    scores = fit(config_with(), workdir, on_evaluation=lambda _: counts.append(len(compiled_between)))
    return workdir, scores, counts


def test_nothing_is_compiled_in_the_loop(flexible):
    _, _, counts = flexible
    assert counts[0] > 6 and counts[1:] == counts[:1] * 2, "updates and scores of 3 sizes, then nothing"


def test_every_size_has_its_scores_and_those_of_the_own_size_have_the_usual_names(flexible):
    workdir, scores, _ = flexible
    own = {"accuracy", "accuracy_top5", "balanced_accuracy", "loss"}
    expected = {f"test/{name}{suffix}" for name in own for suffix in ("", "_4px", "_16px")}
    assert scores.keys() == {"step", *expected}
    assert len({scores[f"test/loss{suffix}"] for suffix in ("", "_4px", "_16px")}) == 3
    assert [row for row in measured(workdir) if "test/loss" in row][-1] == scores


def test_a_run_that_was_ended_and_continued_is_the_same_bit_for_bit(flexible, tmp_path):
    expected, _, _ = flexible
    workdir = tmp_path / "run"

    def stop(scores):
        if scores["step"] == 8:  # so it continues from step 4, in the middle of a round of all sizes
            raise Stop

    with pytest.raises(Stop):
        fit(config_with(), workdir, on_evaluation=stop)
    fit(config_with(), workdir)
    ours, theirs = state_at(workdir, 12), state_at(expected, 12)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert measured(workdir) == measured(expected)


def test_with_only_the_own_size_it_is_the_run_without_the_key(quick_to_compile, tmp_path):
    for name, sizes in (("without", ()), ("own", (8,))):
        fit(config_with(resolutions_px=sizes), tmp_path / name)
    ours, theirs = state_at(tmp_path / "own", 12), state_at(tmp_path / "without", 12)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert measured(tmp_path / "own") == measured(tmp_path / "without")


def test_other_sizes_are_another_run(flexible):
    with pytest.raises(UserError, match=r"resolutions_px was \[4, 8, 16\], is \[8, 16\]"):
        fit(config_with(resolutions_px=(8, 16)), flexible[0])


def test_the_stored_model_is_an_ordinary_one_and_scores_at_another_size_what_training_said(
    flexible, tmp_path, capsys
):
    workdir, scores, _ = flexible
    newest = [f"--workdir={workdir}", "--checkpoint=12"]
    assert evaluate([*newest, "--image_size_px=16"]) == 0
    out = capsys.readouterr().out
    assert (
        "16 px instead of 8 px: token mixing resampled (test accuracy" in out and "less accurate" not in out
    )
    assert "split test, 16 px: 364 images" in out
    (output,) = workdir.glob("evaluation*-16px")
    found = json.loads((output / "scores.json").read_text())
    assert found["accuracy"] == pytest.approx(scores["test/accuracy_16px"])
    assert found["loss"] == pytest.approx(scores["test/loss_16px"], rel=1e-4)
    model = load(workdir, checkpoint=12)
    assert model.at_size(16).scores["test/loss"] == scores["test/loss_16px"]

    for size_px in (8, 16):
        file = tmp_path / f"{size_px}.npz"
        assert export([*newest, f"--image_size_px={size_px}", "--format=npz", f"--output={file}"]) == 0
        exported, ours = load(file), model.at_size(size_px)
        assert exported.preprocess["image_size_px"] == size_px
        jax.tree.map(np.testing.assert_array_equal, exported.params, ours.params)


def test_a_size_that_the_model_does_not_know_is_said_or_refused(digits_run, capsys):
    assert evaluate([f"--workdir={digits_run}", "--image_size_px=12", "--output=/dev/null/x"]) == 2
    assert (
        "token mixing resampled; a model that was not trained with this size is less accurate"
        in capsys.readouterr().out
    )
    for size_px, sentence in [
        (9, "a patch of 2x2 px does not divide an image of 9x9 px"),
        (0, "at least 1"),
        (4096, "more than 65,536"),
    ]:
        assert evaluate([f"--workdir={digits_run}", f"--image_size_px={size_px}"]) == 2
        assert sentence in capsys.readouterr().err


def test_trained_weights_are_made_flexible(digits_run):
    setup = make_setup(settle(config_with(init_from=str(digits_run)), {}))
    state = start_state(setup, initial_params(setup))
    jax.tree.map(np.testing.assert_array_equal, state.params, read_weights(digits_run, "ema")[1])


@pytest.mark.long
@pytest.mark.slow
def test_commands_of_the_page_do_what_they_say(digits_run, flexible, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits_run, tmp_path / "runs" / "digits")
    page = (ROOT / "docs" / "resolutions.md").read_text()
    blocks = re.findall(r"^```\n(python -m.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for command in "".join(blocks).replace("\\\n", "").splitlines():
        program, options = words_of(command)
        # With the small model that is compiled already
        small = arguments({key: value for key, value in CHANGES.items() if key != "resolutions_px"})[1:]
        assert run(program, [*options, *(small if program == "train" else [])]) == 0, command
    assert "accuracy at 4 px 0." in capsys.readouterr().out
    assert load("own_size.npz").preprocess["image_size_px"] == 8
    ours = load("runs/any_size").at_size(16).params
    jax.tree.map(np.testing.assert_array_equal, load("16px.safetensors").params, ours)
    assert any("test/accuracy_16px" in row for row in rows(tmp_path / "runs" / "made_flexible"))


def test_progress_shows_other_sizes_in_a_line_of_their_own():
    scores = {"test/loss": 1.0, "test/accuracy": 0.5, "test/accuracy_4px": 0.25, "test/loss_4px": 2.0}
    scores |= {f"test/accuracy_{px}px": px / 100 for px in range(16, 90, 6)}
    own, text = split_sizes(scores, best_by="accuracy")
    assert own == {"test/loss": 1.0, "test/accuracy": 0.5}
    assert text.startswith("  accuracy at 4 px 0.2500, 16 px 0.1600, ")
    assert max(map(len, text.splitlines())) <= 80
    assert split_sizes(scores, best_by="loss") == (own, "  loss at 4 px 2.0000")
    assert split_sizes(own, best_by="accuracy") == (own, "")


# --- devices and processes


@pytest.mark.long
@pytest.mark.slow
def test_two_devices_with_one_half_of_the_state_each_train_as_one_device_does(
    flexible, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    workdir = tmp_path / "run"
    options = [*arguments({**CHANGES, "mesh.fsdp": 2}), f"--workdir={workdir}"]
    statuses, texts, errors = finish(start_all(1, "train", *options, environment=lambda index: {}))
    assert statuses == [0], errors
    assert "on 2 x cpu" in texts[0] and "one of these sizes: 8, 4, 16 px" in texts[0]
    ours, theirs = state_at(workdir, 12), state_at(flexible[0], 12)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    for row, expected in zip(measured(workdir), measured(flexible[0]), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=0.01)


REPRODUCIBLE = {"reproducible": 8, "total_steps": 6, "eval_every_steps": 6}


@pytest.mark.long
@pytest.mark.slow
def test_reproducible_runs_have_the_same_bits_on_one_device_and_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("NPROC", "8")
    for name, processes in (("one", 1), ("two", 2)):
        environment = (lambda index: {}) if processes == 1 else None
        options = [*arguments({**CHANGES, **REPRODUCIBLE}), f"--workdir={tmp_path / name}"]
        statuses, _, errors = finish(start_all(processes, "train", *options, environment=environment))
        assert statuses == [0] * processes, errors
    ours, theirs = state_at(tmp_path / "two", 6), state_at(tmp_path / "one", 6)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert measured(tmp_path / "two") == measured(tmp_path / "one")
