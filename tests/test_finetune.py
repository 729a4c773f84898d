"""Tests training that starts from other weights, from the command to the checkpoints."""

import json
import re
import shutil

import chex
import jax
import numpy as np
import pytest

from mlpmixer_flax.checksums import write_checksums
from mlpmixer_flax.config import get_finetuning_config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import open_run, read_weights
from mlpmixer_flax.train import main
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.weights.files import write_npz, write_safetensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_to_compile")]

MODEL = {"patches": {"size": (2, 2)}, "hidden_dim": 16, "num_blocks": 2, "tokens_mlp_dim": 8}
MODEL["channels_mlp_dim"] = 32
SMALL = ["--config=digits.py", "--config.total_steps=6", "--config.model.hidden_dim=16"]
SMALL += [
    "--config.model.num_blocks=2",
    "--config.model.tokens_mlp_dim=8",
    "--config.model.channels_mlp_dim=32",
]


def random_weights(num_classes, *, channels=1, scale=1.0, seed=0):
    model = MlpMixer(num_classes=num_classes, **MODEL)
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, channels), np.float32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: (scale * rng.normal(0, 1 / np.sqrt(p.size / p.shape[-1]), p.shape)).astype(np.float32), like
    )


def start_of(workdir):
    """Returns the weights with which a run ends; with STILL they are those with which it began."""
    return read_weights(workdir)[1]


def weights_of(workdir):
    """Returns the weights of a run that others start from."""
    return open_run(workdir).params


STILL = "--config.optimizer.learning_rate=1e-30"  # so small that the weights do not change


def test_a_run_starts_from_a_file_with_a_new_head(tmp_path, capsys):
    weights = random_weights(7, channels=3)
    write_npz(tmp_path / "w.npz", weights, metadata={})
    workdir = tmp_path / "run"
    assert main([*SMALL, STILL, f"--config.init_from={tmp_path}/w.npz", f"--workdir={workdir}"]) == 0
    out = capsys.readouterr().out
    assert "head: new, since the weights have 7 classes and the model 10" in out
    assert "summed over 3 channels" in out
    began = start_of(workdir)
    np.testing.assert_allclose(
        began["stem"]["kernel"], weights["stem"]["kernel"].sum(2, keepdims=True), rtol=1e-6
    )
    for name in ("MixerBlock_0", "MixerBlock_1", "pre_head_layer_norm"):
        chex.assert_trees_all_close(began[name], weights[name], rtol=1e-6, atol=1e-25)
    assert np.abs(began["head"]["kernel"]).max() < 1e-20

    # A run that continues does not need the weights.
    (tmp_path / "w.npz").unlink()
    assert main([*SMALL, STILL, f"--config.init_from={tmp_path}/w.npz", f"--workdir={workdir}"]) == 0


def test_gelu_and_pixels_follow_the_weights_and_are_stored(tmp_path, capsys):
    origin = {
        "model": {"gelu": "erf"},
        "preprocess": {"image_size_px": 8, "mean": [0.1], "std": [0.9], "interpolation": "bicubic"},
    }
    write_safetensors(tmp_path / "w.safetensors", random_weights(10), metadata=origin)
    common = [*SMALL, f"--config.init_from={tmp_path}/w.safetensors"]
    assert main([*common, f"--workdir={tmp_path}/run"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["gelu"] == "erf" and config["preprocess"]["interpolation"] == "bicubic"
    assert config["preprocess"]["mean"] == [0.1] and config["preprocess"]["std"] == [0.9]
    out = capsys.readouterr().out
    assert f"model.gelu=erf, as in the training of {tmp_path}/w.safetensors" in out
    assert "head: kept, 10 classes" in out

    assert main([*common, f"--workdir={tmp_path}/other", "--config.preprocess.mean=0.5"]) == 0
    message = f"preprocess.mean=(0.5,), although {tmp_path}/w.safetensors was trained with (0.1,)"
    assert message in capsys.readouterr().out
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["preprocess"]["mean"] == [0.5] and config["preprocess"]["std"] == [0.9]

    # The weights may also be a run: the next run follows its values too.
    following = [*SMALL, f"--config.init_from={tmp_path}/run", f"--workdir={tmp_path}/next", STILL]
    assert main(following) == 0
    said = capsys.readouterr().out
    assert f"model.gelu=erf, as in the training of {tmp_path}/run" in said
    assert re.search(
        f"^{tmp_path}/run: step [0-9]+, the best checkpoint \\(test accuracy", said, re.MULTILINE
    )
    chex.assert_trees_all_close(
        start_of(tmp_path / "next"), weights_of(tmp_path / "run"), rtol=1e-6, atol=1e-25
    )
    shutil.rmtree(tmp_path / "run")
    assert main(following) == 0  # it has ended, and does not need the weights again


@pytest.mark.parametrize(("tokens_mlp_dim", "way"), [(32, "exact for tiles"), (8, "resampled")])
def test_a_run_starts_at_twice_the_resolution(tmp_path, capsys, tokens_mlp_dim, way):
    write_npz(tmp_path / "w.npz", random_weights(10), metadata={})
    larger = ["--config.preprocess.image_size_px=16", f"--config.model.tokens_mlp_dim={tokens_mlp_dim}"]
    arguments = [*SMALL, *larger, f"--config.init_from={tmp_path}/w.npz", f"--workdir={tmp_path}/run"]
    assert main(arguments) == 0
    assert way in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"preprocess": {"std": [0.0]}}, "preprocess.std=.* must be at least 0.0001"),
        ({"preprocess": {"interpolation": "lanczos"}}, "unknown preprocess.interpolation 'lanczos'"),
        (
            {"preprocess": {"mean": ["a"]}},
            r"preprocess.mean=\('a',\) has the wrong type: give a value such as",
        ),
        (
            {"preprocess": {"mean": 0.5}},
            "the weights say preprocess.mean=0.5, which has the wrong type: set --config.preprocess.mean",
        ),
        ({"preprocess": None}, "the metadata of .*w.npz is invalid: restore it, or write it again"),
        (
            {"preprocess": {"image_size_px": "8"}},
            "the metadata of .*w.npz is invalid: restore it, or write it again",
        ),
        ({"class_names": 5}, "the metadata of .*w.npz is invalid: restore it, or write it again"),
    ],
)
def test_the_metadata_of_a_file_is_checked(tmp_path, capsys, metadata, message):
    write_npz(tmp_path / "w.npz", random_weights(10), metadata={"model": {}, "preprocess": {}, **metadata})
    arguments = [*SMALL, f"--config.init_from={tmp_path}/w.npz", f"--workdir={tmp_path}/run"]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_grayscale_images_follow_weights_with_the_same_mean_for_all_channels(tmp_path):
    origin = {"model": {}, "preprocess": {"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3]}}
    write_npz(tmp_path / "w.npz", random_weights(10, channels=3), metadata=origin)
    assert main([*SMALL, f"--config.init_from={tmp_path}/w.npz", f"--workdir={tmp_path}/run"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preprocess"]["mean"] == [0.4] and config["preprocess"]["std"] == [0.3]


@pytest.mark.long
def test_a_run_starts_from_the_ema_of_another_with_a_new_head(tmp_path, capsys):
    first = [*SMALL, "--config.ema_decay=0.9", f"--workdir={tmp_path}/first"]
    assert main(first) == 0
    last, ema = (read_weights(tmp_path / "first", which)[1] for which in ("last", "ema"))
    assert (last["stem"]["kernel"] != ema["stem"]["kernel"]).any()
    following = [*SMALL, STILL, f"--config.init_from={tmp_path}/first", f"--workdir={tmp_path}/next"]
    sigmoid = ["--config.init_head=reset", "--config.loss=sigmoid", "--config.model.head_bias_init=-6.9"]
    assert main([*following, *sigmoid]) == 0
    began = start_of(tmp_path / "next")
    np.testing.assert_allclose(began["stem"]["kernel"], ema["stem"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(began["head"]["bias"], -6.9, rtol=1e-6)
    assert "head: new, as asked for" in capsys.readouterr().out


def test_weights_that_do_not_fit_stop_the_run_before_anything_is_written(tmp_path, capsys):
    write_npz(tmp_path / "w.npz", random_weights(10), metadata={})
    arguments = [*SMALL, "--config.model.num_blocks=3", f"--config.init_from={tmp_path}/w.npz"]
    assert main([*arguments, f"--workdir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "num_blocks" in error and "MixerBlock_2" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_linear_probe_changes_the_head_and_nothing_else(tmp_path):
    weights = random_weights(10)
    write_npz(tmp_path / "w.npz", weights, metadata={})
    arguments = [*SMALL, "--config.freeze=all_but_head", f"--config.init_from={tmp_path}/w.npz"]
    assert main([*arguments, f"--workdir={tmp_path}/run"]) == 0
    after = start_of(tmp_path / "run")
    assert (after["head"]["kernel"] != weights["head"]["kernel"]).all()
    for name in weights.keys() - {"head"}:
        chex.assert_trees_all_equal(after[name], weights[name])
    assert main([*arguments, f"--workdir={tmp_path}/bad", "--config.freeze=stems"]) == 2
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "freeze"),
    [
        ([], "head"),
        ([], "stem, head"),
        (["--config.init_from={}/ten.npz", "--config.init_head=reset"], "head"),
        (["--config.init_from={}/seven.npz"], "stem,MixerBlock_0,head"),  # other classes, so a new head
    ],
)
def test_a_new_head_that_is_frozen_is_refused_because_nothing_could_learn(
    tmp_path, capsys, arguments, freeze
):
    write_npz(tmp_path / "ten.npz", random_weights(10), metadata={})
    write_npz(tmp_path / "seven.npz", random_weights(7), metadata={})
    workdir = tmp_path / "run"
    given = [*SMALL, *(argument.format(tmp_path) for argument in arguments), f"--config.freeze={freeze}"]
    assert main([*given, f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: freeze={freeze!r} freezes a new head, whose weights are all 0, so no layer can"
    )
    assert "leave 'head' out of --config.freeze" in error and not workdir.exists()


def test_a_head_that_is_kept_may_be_frozen(tmp_path):
    weights = random_weights(10)
    write_npz(tmp_path / "w.npz", weights, metadata={})
    arguments = [*SMALL, "--config.freeze=head", f"--config.init_from={tmp_path}/w.npz"]
    assert main([*arguments, f"--workdir={tmp_path}/run"]) == 0
    after = start_of(tmp_path / "run")
    chex.assert_trees_all_equal(after["head"], weights["head"])
    assert (after["stem"]["kernel"] != weights["stem"]["kernel"]).any()


def test_a_run_starts_from_the_best_checkpoint_of_another_or_from_one_that_is_named(tmp_path):
    first = [
        *SMALL,
        "--config.eval_every_steps=2",
        "--config.save_every_steps=2",
        "--config.keep_checkpoints=3",
    ]
    assert main([*first, "--config.optimizer.learning_rate=0.3", f"--workdir={tmp_path}/first"]) == 0
    file = tmp_path / "first" / "checkpoints" / "4" / "metrics" / "metrics"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"test/accuracy": 0.99}))
    write_checksums(file.parent.parent)
    for name, step in [("first", 4), ("first@best", 4), ("first@last", 6), ("first@2", 2)]:
        workdir = tmp_path / f"from {name}"
        assert main([*SMALL, STILL, f"--config.init_from={tmp_path}/{name}", f"--workdir={workdir}"]) == 0
        expected = read_weights(tmp_path / "first", str(step))[1]
        chex.assert_trees_all_close(start_of(workdir), expected, rtol=1e-6, atol=1e-25)


# Weights with 21,843 classes are reported to diverge in fine-tuning (timm pull request 651).
RECIPE = ["--config.total_steps=60", "--config.schedule.warmup_steps=10", "--config.log_every_steps=5"]


def losses_from_badly_scaled_weights(tmp_path, *arguments):
    """Returns the losses of the recipe for published weights, shortened, from weights that are 20 times too large."""
    write_npz(tmp_path / "w.npz", random_weights(21843, scale=20.0), metadata={})
    recipe = get_finetuning_config().optimizer
    optimizer = [f"--config.optimizer.{key}={value}" for key, value in recipe.items()]
    main(
        [*SMALL, *RECIPE, *optimizer, f"--config.init_from={tmp_path}/w.npz", f"--workdir={tmp_path}/run"]
        + list(arguments)
    )
    return [
        row["train/loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row
    ]


def test_badly_scaled_weights_of_21843_classes_do_not_diverge(tmp_path):
    losses = losses_from_badly_scaled_weights(tmp_path)
    assert len(losses) == 12 and max(losses) < 4 and losses[-1] < np.log(10)  # the loss of guessing


def test_without_clipping_and_warmup_the_same_weights_do_diverge(tmp_path):
    """Otherwise the test above would show nothing."""
    loose = ["--config.optimizer.clip_norm=0", "--config.schedule.warmup_steps=0"]
    losses = losses_from_badly_scaled_weights(tmp_path, *loose)
    assert not losses or max(losses) > 20
