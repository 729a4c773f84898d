"""One set of weights at several sizes, as the programs show it: figures, files, cards, texts, and continuing a run."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax import UserError, fit, load, load_config
from mlpmixer_flax.analyze import main as analyze
from mlpmixer_flax.evaluate import main as evaluate
from mlpmixer_flax.export import export
from mlpmixer_flax.inference.card import model_card
from mlpmixer_flax.inference.hub_folder import timm_config
from mlpmixer_flax.summary import main as summary
from mlpmixer_flax.training.report import read_metrics

CHANGES = {
    "resolutions_px": (16, 4, 8),
    "best_by": "balanced_accuracy",
    "model.hidden_dim": 16,
    "model.channels_mlp_dim": 16,
    "model.num_blocks": 2,
    "augment.mixup_alpha": 0.0,  # slow to compile
    "batch_size": 32,
    "optimizer.learning_rate": 0.01,
    "schedule.name": "constant",
    "total_steps": 4,
    "log_every_steps": 2,
    "eval_every_steps": 2,
    "save_every_steps": 2,
}


def config_with(**changes):
    return load_config("digits.py", {**CHANGES, **changes})


@pytest.fixture(scope="module")
def flexible(quick_to_compile, tmp_path_factory):
    """A run for 4, 8 and 16 px, of 4 updates, and the lines that it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "flexible"
    fit(config_with(), workdir)
    return workdir


@pytest.fixture(scope="module")
def own_size(flexible, tmp_path_factory):
    """Its exported weights."""
    file = tmp_path_factory.mktemp("exported") / "own.safetensors"
    export(load(flexible), file, format="safetensors")
    return file


# --- Model.at_size


def test_a_model_at_another_size_goes_back_to_its_own_weights(flexible):
    model = load(flexible)
    again = model.at_size(4).at_size(8)
    assert again.params is model.params and again.scores == model.scores and model.at_size(8) is model
    direct, detour = model.at_size(16), dataclasses.replace(model, flip=True).at_size(4).at_size(16)
    jax.tree.map(np.testing.assert_array_equal, detour.params, direct.params)
    assert detour.scores == direct.scores and "test/accuracy" in direct.scores
    assert (direct.flip, detour.flip) == (False, True)


def test_a_change_of_a_model_at_another_size_is_kept_and_its_own_weights_too(flexible):
    model = load(flexible)
    changes = {"flip": True, "preprocess": {**model.at_size(16).preprocess, "crop_fraction": 0.5}}
    changed = dataclasses.replace(model.at_size(16), **changes)
    for size_px in (8, 4):
        direct, detour = model.at_size(size_px), changed.at_size(size_px)
        jax.tree.map(np.testing.assert_array_equal, detour.params, direct.params)
        assert detour.preprocess == {**direct.preprocess, "crop_fraction": 0.5} and detour.flip
        assert (detour.scores, detour.resolutions_px) == (direct.scores, direct.resolutions_px)
        again = dataclasses.replace(detour, flip=False).at_size(16).params
        jax.tree.map(np.testing.assert_array_equal, again, model.at_size(16).params)


def test_weights_that_a_user_puts_in_are_the_ones_that_are_resampled(flexible):
    zeros = jax.tree.map(np.zeros_like, load(flexible).at_size(4).params)
    model = dataclasses.replace(load(flexible).at_size(4), params=zeros).at_size(8)
    assert not any(leaf.any() for leaf in jax.tree.leaves(model.params))


@pytest.mark.parametrize(
    ("size_px", "message"),
    [
        (16.0, "size_px=16.0 has the wrong type: give a number of pixels, such as 32"),
        ("16", "size_px='16' has the wrong type"),
        (None, "size_px=None has the wrong type"),
        (True, "size_px=True has the wrong type"),
        (0, "size_px=0 must be at least 1"),
        (9, "a patch of 2x2 px does not divide an image of 9x9 px: choose another size_px$"),
    ],
)
def test_what_is_no_size_is_refused(flexible, size_px, message):
    with pytest.raises(UserError, match=message):
        load(flexible).at_size(size_px)


# --- exported weights


@pytest.mark.slow
def test_exported_weights_know_the_sizes_that_they_were_trained_with(flexible, own_size, tmp_path, capsys):
    assert load(own_size).resolutions_px == load(flexible).resolutions_px == (16, 4, 8)
    options = ["--dataset=digits", f"--output={tmp_path / 'scores'}"]
    assert evaluate([f"--weights={own_size}", "--image_size_px=16", *options]) == 0
    assert "16 px instead of 8 px: token mixing resampled\n" in capsys.readouterr().out
    assert evaluate([f"--weights={own_size}", "--image_size_px=12", *options]) == 0
    assert "a model that was not trained with this size is less accurate" in capsys.readouterr().out
    export(load(flexible).at_size(16), tmp_path / "16px.npz", format="npz")
    assert load(tmp_path / "16px.npz").resolutions_px == ()  # an ordinary model of that size


@pytest.mark.parametrize("sizes", [5, "16", [8, "16"], [True], [0], None])
def test_sizes_that_weights_state_are_checked(own_size, tmp_path, sizes):
    content = own_size.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    (key,) = [key for key, text in header["__metadata__"].items() if "resolutions_px" in text]
    metadata = json.loads(header["__metadata__"][key])
    header["__metadata__"][key] = json.dumps({**metadata, "resolutions_px": sizes})
    changed = json.dumps(header).encode()
    file = tmp_path / "changed.safetensors"
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(UserError, match="the metadata of .* is invalid: restore it, or write it again"):
        load(file)


def test_a_model_card_has_the_scores_of_all_sizes_and_names_the_sizes(flexible):
    model = load(flexible)
    card = model_card(model, timm_config(model), name="ann/digits")
    for score, name in [("accuracy", "accuracy"), ("balanced_accuracy", "balanced accuracy")]:
        for size_px in (4, 16):
            value = f"{model.scores[f'test/{score}_{size_px}px']:.2%}".replace("%", " %")
            assert f"| test | {name} at {size_px} px | {value} |" in card
    assert "_4px" not in card and "_16px" not in card
    names = re.findall(r"\| test \| (accuracy.*?) \|", card)
    assert names == ["accuracy", "accuracy at 4 px", "accuracy at 16 px"]
    assert "updates of 32 images, each with images of one of 3 sizes (4, 8, 16 px), with adamw" in card


# --- programs


@pytest.mark.slow
def test_analyze_draws_all_sizes_and_never_replaces_the_files_of_another_size(flexible, capsys):
    parts = ["curves", "token_mixing", "fewshot", "--shots=2"]
    assert analyze([f"--workdir={flexible}", *parts]) == 0
    assert analyze([f"--workdir={flexible}", "--image_size_px=16", *parts]) == 0
    assert analyze([f"--workdir={flexible}", "--image_size_px=8", *parts]) == 0
    assert {folder.name for folder in flexible.glob("analysis*")} == {"analysis", "analysis-16px"}
    own, other = (
        json.loads((flexible / name / "fewshot.json").read_text()) for name in ("analysis", "analysis-16px")
    )
    assert "image_size_px" not in own and other["image_size_px"] == 16
    with Image.open(flexible / "analysis-16px" / "token_mixing_block00.png") as image:
        assert image.text["Title"].replace("\n", " ").endswith(", 16 px")
    assert f"files in {flexible}/analysis-16px:" in capsys.readouterr().out.replace("\n  ", " ")


def test_shuffle_refuses_several_sizes(flexible, capsys):
    sizes = "--config.resolutions_px=4,8"
    assert analyze([f"--workdir={flexible}", "shuffle", "--config=digits.py", sizes]) == 2
    assert "resolutions_px=(4, 8) cannot be used for shuffle" in capsys.readouterr().err


@pytest.mark.slow
def test_the_score_that_is_printed_names_its_size(flexible, tmp_path, capsys):
    model, options = load(flexible), [f"--workdir={flexible}", f"--output={tmp_path}"]
    own, other = (f"{each.scores['test/balanced_accuracy']:.2%}" for each in (model, model.at_size(16)))
    assert evaluate([*options, "--image_size_px=16"]) == 0
    out = capsys.readouterr().out
    assert f"the best checkpoint (test balanced accuracy {own} at 8 px)\n" in out
    assert f"16 px instead of 8 px: token mixing resampled (test balanced accuracy {other})\n" in out
    assert evaluate(options) == 0
    assert f"the best checkpoint (test balanced accuracy {own})\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size_px", "message"),
    [
        (0, "--image_size_px=0 must be at least 1"),
        (5000, "--image_size_px=5000 must be at most 4096"),
        (9, "a patch of 2x2 px does not divide an image of 9x9 px: choose another --image_size_px"),
    ],
)
def test_an_error_names_the_option_that_was_given(flexible, size_px, message, capsys):
    assert evaluate([f"--workdir={flexible}", f"--image_size_px={size_px}"]) == 2
    out, err = capsys.readouterr()
    assert message in err and "preprocess." not in err
    assert ("using step" in out) == (size_px == 9)  # before weights are read, if it is wrong for every model


def test_summary_counts_the_work_of_a_size(flexible, own_size, capsys):
    for named in (f"--workdir={flexible}", f"--weights={own_size}"):
        for size_px, tokens in [(8, 16), (16, 64)]:
            assert summary([named, f"--image_size_px={size_px}"]) == 0
            out = capsys.readouterr().out
            assert f"GMACs per image of {size_px}x{size_px}x1" in out and f" {tokens}x16 " in out
        assert summary([named, "--image_size_px=9"]) == 2
        assert "choose another --image_size_px" in capsys.readouterr().err
    assert summary(["--config=digits.py", "--image_size_px=16"]) == 2
    assert "give --config.preprocess.image_size_px=16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_prints_the_score_of_best_by_for_all_sizes(quick_to_compile, tmp_path, capsys):
    scores = fit(config_with(total_steps=1), tmp_path / "run")
    found = [f"{px} px {scores[f'test/balanced_accuracy_{px}px']:.4f}" for px in (4, 16)]
    assert f"  balanced accuracy at {', '.join(found)}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_continues_if_its_sizes_are_given_in_another_order(quick_to_compile, tmp_path):
    whole, continued = tmp_path / "whole", tmp_path / "continued"
    fit(config_with(), whole)
    fit(config_with(total_steps=2), continued)
    fit(config_with(resolutions_px=(8, 4, 16)), continued)
    ours, theirs = (load(workdir, checkpoint="last").params for workdir in (continued, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    losses = [
        [row["train/loss"] for row in read_metrics(workdir / "metrics.jsonl") if "train/loss" in row]
        for workdir in (continued, whole)
    ]
    assert losses[0] == losses[1]
