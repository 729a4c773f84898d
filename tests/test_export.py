"""What is written is what was trained, and comes back bit by bit."""

import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlpmixer_flax import UserError, pretrained
from mlpmixer_flax.checkpoint import read_weights
from mlpmixer_flax.configfile import load_config
from mlpmixer_flax.export import export, main
from mlpmixer_flax.train import train
from mlpmixer_flax.weightfiles import open_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run that keeps an average and whose best checkpoint is not its last."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    values = {
        "model.hidden_dim": 16,
        "model.channels_mlp_dim": 16,
        "model.num_blocks": 2,
        "ema_decay": 0.9,
        "total_steps": 40,
        "eval_every_steps": 20,
        "save_every_steps": 10,
        "keep_checkpoints": 4,
        "schedule.name": "constant",
        "optimizer.learning_rate": 0.01,
    }
    train(load_config("digits.py", [f"--config.{key}={value}" for key, value in values.items()]), workdir)
    metrics = workdir / "checkpoints" / "20" / "metrics" / "metrics"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"test/accuracy": 0.999}))
    return workdir


@pytest.mark.parametrize("format", ["npz", "safetensors"])
@pytest.mark.parametrize("weights", ["last", "best", "ema"])
def test_exported_weights_come_back_bit_by_bit(run, tmp_path, format, weights, capsys):
    file = tmp_path / "weights"
    arguments = [f"--workdir={run}", f"--format={format}", f"--output={file}", f"--weights={weights}"]
    assert main(arguments) == 0
    step, params = read_weights(run, weights)
    assert step == {"last": 40, "best": 20, "ema": 40}[weights]
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(pretrained.load(str(file), like), params)
    out = capsys.readouterr().out
    assert f"step {step} of" in out
    assert ("--weights=ema" in out) == (weights == "last")
    assert ("GELUTanh" in out) == (format == "safetensors")


def test_the_three_kinds_of_weights_differ(run):
    last, best, ema = (read_weights(run, which)[1]["stem"]["kernel"] for which in ("last", "best", "ema"))
    assert (last != ema).any() and (best != ema).any() and (best != last).any()


def test_the_layouts_are_googles_and_timms(run, tmp_path):
    export(run, tmp_path / "w.npz", format="npz")
    export(run, tmp_path / "w.safetensors", format="safetensors")
    google, timm = np.load(tmp_path / "w.npz"), load_file(tmp_path / "w.safetensors")
    golden = Path(__file__).parent / "golden"
    blocks = ("_2/", ".2.")  # the golden model has a block more
    assert set(google.files) == {n for n in np.load(golden / "google_tiny.npz").files if blocks[0] not in n}
    assert set(timm) == {n for n in load_file(golden / "timm_tiny.safetensors") if blocks[1] not in n}
    np.testing.assert_array_equal(
        google["MixerBlock_1/token_mixing/Dense_0/kernel"].T, timm["blocks.1.mlp_tokens.fc1.weight"]
    )


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_a_file_says_how_its_weights_were_trained(run, tmp_path, format):
    file = tmp_path / "weights"
    export(run, file, format=format)
    metadata = open_weights(file).metadata
    assert metadata["num_classes"] == 10 and metadata["class_names"] == [str(i) for i in range(10)]
    assert metadata["model"]["gelu"] == "tanh" and metadata["model"]["hidden_dim"] == 16
    assert metadata["preprocess"]["image_size_px"] == 8
    assert metadata["preprocess"]["mean"] == metadata["preprocess"]["std"] == [0.5]
    assert metadata["step"] == 40


def test_what_cannot_be_exported_is_said_in_a_sentence(run, tmp_path):
    with pytest.raises(UserError, match="no run in .*nowhere"):
        export(tmp_path / "nowhere", tmp_path / "w", format="npz")
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        export(tmp_path, tmp_path / "w", format="npz")
    with pytest.raises(UserError, match="cannot write"):
        export(run, tmp_path / "no" / "such" / "folder", format="npz")
    assert not list(tmp_path.glob("w*"))


def test_the_program_fails_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "mlpmixer_flax.export", f"--workdir={tmp_path}", "--format=npz"]
    done = subprocess.run([*command, f"--output={tmp_path}/w.npz"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run in") and done.stderr.count("\n") == 1
