"""Weights whose names are wrapped by another program, among arrays that are not weights."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from mlpmixer_flax import UserError, pretrained
from mlpmixer_flax.inference.load import load
from mlpmixer_flax.weights.files import open_weights
from mlpmixer_flax.weights.names import find_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
ARRAYS = {
    "google": dict(np.load(GOLDEN / "google_tiny.npz")),
    "prelinen": dict(np.load(GOLDEN / "google_tiny_prelinen.npz")),
    "timm": load_file(GOLDEN / "timm_tiny.safetensors"),
}
PLAIN = {"google": "google_tiny.npz", "prelinen": "google_tiny_prelinen.npz", "timm": "timm_tiny.safetensors"}


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return path


def named(layout, prefix, change=lambda array: array):
    return {f"{prefix}{name}": change(array) for name, array in ARRAYS[layout].items()}


def assert_same_as_plain(path, layout):
    weights, plain = open_weights(path), open_weights(GOLDEN / PLAIN[layout])
    assert weights.shapes == plain.shapes and weights.unknown == () and weights.layout == plain.layout
    for name in plain.shapes:
        np.testing.assert_array_equal(weights.read(name), plain.read(name))
    return weights


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ("google", "params/"),
        ("google", "opt/target/"),
        ("google", "optimizer/target/params/"),
        ("google", "model.params."),
        ("prelinen", "opt/target/"),
        ("timm", "model."),
        ("timm", "module."),
        ("timm", "_orig_mod."),
        ("timm", "module._orig_mod."),
        ("timm", "_orig_mod.module."),
        ("timm", "state_dict."),
        ("timm", "state_dict.model."),
        ("timm", "timm_model."),
        ("timm", "net.backbone."),
    ],
)
def test_one_prefix_that_all_names_share_is_left_out(tmp_path, layout, prefix, suffix):
    weights = assert_same_as_plain(save(tmp_path / f"w{suffix}", named(layout, prefix)), layout)
    assert weights.notes == (f"the weights are those under {prefix!r}",)


@pytest.mark.parametrize(
    "prefix", ["ema/", "ema_params/", "params_ema/", "model_ema.", "ema_model.module.", "swa."]
)
def test_a_file_of_nothing_but_an_ema_gives_the_ema(tmp_path, prefix):
    layout = "timm" if "." in prefix else "google"
    weights = assert_same_as_plain(save(tmp_path / "w.npz", named(layout, prefix)), layout)
    assert weights.notes == (f"the weights are those under {prefix!r}, an average over updates (EMA)",)


@pytest.mark.parametrize(
    ("plain", "average"),
    [("params/", "ema/"), ("params/", "params_ema/"), ("model.", "model_ema."), ("state_dict.", "state_dict_ema."),
     ("", "ema_model."), ("", "ema/"), ("model.", "model.ema."), ("online_model.", "ema_model.")],
)  # fmt: skip
@pytest.mark.parametrize("first", ["plain", "ema"])
def test_weights_are_taken_before_their_ema_and_never_mixed_with_it(tmp_path, plain, average, first):
    layout = "google" if "/" in plain + average else "timm"
    halves = [named(layout, plain), named(layout, average, lambda array: -array)]
    arrays = {**halves[first == "ema"], **halves[first != "ema"]}
    weights = assert_same_as_plain(save(tmp_path / "w.npz", arrays), layout)
    (note,) = weights.notes
    assert f"({len(ARRAYS[layout])})" in note and "an average over updates (EMA): to use it" in note


def test_an_ema_is_taken_if_the_plain_weights_are_not_complete(tmp_path):
    arrays = {"params/head/bias": np.ones(10, np.float32), **named("google", "ema/")}
    weights = assert_same_as_plain(save(tmp_path / "w.npz", arrays), "google")
    assert "under 'ema/'" in weights.notes[0] and "params (1)" in weights.notes[0]


OPTIMIZERS = {
    "big_vision": (
        "google",
        "params/",
        ["opt/0/mu/", "opt/0/nu/"],
        ["opt/0/count", "chrono/accum_train_time"],
    ),
    "flax.optim": ("prelinen", "opt/target/", ["opt/state/param_states/mu/"], ["opt/state/step"]),
    "optax": ("google", "params/", ["opt_state/0/mu/params/", "opt_state/0/trace/"], ["step"]),
    "optax's average of gradients": ("google", "params/", ["opt_state/0/ema/"], ["opt_state/0/count"]),
    "torch": (
        "timm",
        "model.",
        ["optimizer.state.exp_avg.", "optimizer.exp_avg_sq."],
        ["epoch", "global_step"],
    ),
    "plain names": ("timm", "", ["optimizer_state.momentum_buffer."], ["step", "lr", "rng"]),
    "another optimizer": ("google", "", ["adam/mu/"], ["epoch"]),
}


@pytest.mark.parametrize("program", OPTIMIZERS)
def test_an_optimizers_copies_and_counters_are_set_aside_and_said(tmp_path, program):
    layout, prefix, copies, counters = OPTIMIZERS[program]
    arrays = {name: np.asarray(7) for name in counters}  # integers, which weights are not
    for copy in copies:
        arrays |= named(layout, copy, lambda array: array * np.nan)
    weights = assert_same_as_plain(save(tmp_path / "w.npz", {**arrays, **named(layout, prefix)}), layout)
    (note,) = weights.notes
    assert "other arrays of the file are not used: " in note and "average" not in note
    assert all(name.replace(".", "/").split("/")[0] in note for name in arrays)


def test_a_file_of_nothing_but_an_optimizers_state_holds_no_weights(tmp_path):
    with pytest.raises(UserError, match="w.npz holds no Mixer weights"):
        open_weights(save(tmp_path / "w.npz", named("google", "opt/0/mu/")))


def test_the_note_is_bounded(tmp_path):
    many = {f"buffer{number}/{'x' * 50}": np.zeros(1) for number in range(500)}
    weights = assert_same_as_plain(save(tmp_path / "w.npz", {**many, **named("google", "params/")}), "google")
    assert "and 496 more groups" in weights.notes[0] and len(weights.notes[0]) < 300


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_around_single_layers_are_left_out(tmp_path, wrapper):
    arrays = {
        re.sub(r"(blocks\.\d|norm|mlp_tokens)\.", rf"\1.{wrapper}.", name): array
        for name, array in named("timm", f"{wrapper}.").items()
    }
    assert_same_as_plain(save(tmp_path / "w.safetensors", arrays), "timm")


def test_two_sets_of_weights_that_are_equally_good_are_refused(tmp_path):
    file = save(tmp_path / "w.npz", {**named("timm", "student."), **named("timm", "teacher.")})
    with pytest.raises(
        UserError, match="w.npz holds 2 sets of Mixer weights, under 'student.', 'teacher.': write"
    ):
        open_weights(file)
    file = save(tmp_path / "e.npz", {**named("timm", "ema_0."), **named("timm", "ema_1.")})
    with pytest.raises(UserError, match="e.npz holds 2 sets of Mixer weights"):
        open_weights(file)
    twice = {**ARRAYS["timm"], "head._orig_mod.bias": np.zeros(10, np.float32)}
    with pytest.raises(
        UserError, match="head/bias twice, as 'head.bias' and 'head._orig_mod.bias': remove one"
    ):
        open_weights(save(tmp_path / "t.npz", twice))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", ["stem.norm.weight", "blocks.0.ls1", "cls_token", "blocks.9.norm1.scale"])
def test_parameters_of_another_architecture_are_never_set_aside(tmp_path, prefix, name):
    arrays = {**named("timm", prefix), f"{prefix}{name}": np.ones(4, np.float32)}
    file = save(tmp_path / "w.safetensors", arrays)
    assert open_weights(file).unknown == (f"{prefix}{name}",)
    like = unflatten_dict(
        {
            ours: jax.ShapeDtypeStruct(shape, np.float32)
            for ours, shape in open_weights(GOLDEN / PLAIN["timm"]).shapes.items()
        },
        sep="/",
    )
    with pytest.raises(UserError, match="unexpected, not in the model"):
        pretrained.load(str(file), like)


def test_a_wrapped_file_predicts_like_the_plain_one_and_says_what_it_leaves_out(tmp_path, capsys):
    arrays = {**named("timm", "module._orig_mod."), "optimizer.step": np.asarray(3)}
    wrapped, plain = load(save(tmp_path / "w.safetensors", arrays)), load(GOLDEN / PLAIN["timm"])
    jax.tree.map(np.testing.assert_array_equal, wrapped.params, plain.params)
    note = "the weights are those under 'module._orig_mod.'; other arrays of the file are not used: optimizer (1)"
    assert capsys.readouterr().out.count(note) == 1


def test_a_hostile_number_of_long_names_is_searched_in_time():
    names = [f"{'/' * 5000}{number}/bias" for number in range(2000)]
    assert find_parameters(names, "w") is None
