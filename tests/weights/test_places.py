"""Weights from files, folders and runs: wherever they lie, they are the same, and what is no weights is named."""

import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlpmixer_flax as mf
from mlpmixer_flax import UserError, export, pretrained
from mlpmixer_flax.config import resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.rundir import write_run
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.step import TrainState
from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.files import write_npz, write_safetensors
from mlpmixer_flax.weights.source import find, named_run

GOLDEN = Path(__file__).parent.parent / "golden"
TIMM = GOLDEN / "timm_tiny.safetensors"
CONFIG = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.9}}


def make_run(workdir, *, ema):
    """Writes a run with checkpoints of steps 10 and 20, of random weights; that of step 10 is the best."""
    overrides = ["--config.model.hidden_dim=16", "--config.model.num_blocks=1", f"--config.ema_decay={ema}"]
    config = resolve(load_config("digits.py", overrides), {})
    write_run(workdir, config.to_dict(), class_names=list("0123456789"))
    model, rng = MlpMixer(num_classes=10, **config.model.to_dict()), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    checkpoints = Checkpoints(workdir, keep=2)
    for step, accuracy in [(10, 0.9), (20, 0.8)]:
        params, average = (
            jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), shapes)
            for _ in range(2)
        )
        state = TrainState(jnp.asarray(step), params, (), average if ema else None)
        checkpoints.save(step, state, {"test/accuracy": accuracy})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", ema=0.9)


def refusal(source):
    """Returns the one sentence with which every use of a source is refused."""
    sentences = set()
    for use in (find, pretrained.describe, mf.load):
        with pytest.raises(UserError) as caught:
            use(source)
        sentences.add(str(caught.value))
    (sentence,) = sentences
    assert "\n" not in sentence
    return sentence


# Our own exports


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "model.safetensors", "weights"])
@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_an_export_is_the_same_model_anywhere_without_the_files_of_its_run(
    run, tmp_path, capsys, name, format
):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    export.export(mf.load(run), here / "w", format=format)
    shutil.move(here / "w", there / name)
    if name != "model.safetensors":  # a neighbour that belongs to something else
        (there / "config.json").write_text(json.dumps(CONFIG))
    capsys.readouterr()
    model, own = mf.load(there / name), mf.load(run)
    assert "assumed" not in capsys.readouterr().out
    chex.assert_trees_all_equal(model.params, own.params)
    assert (model.class_names, model.loss, model.module.gelu) == (own.class_names, own.loss, own.module.gelu)
    assert {**model.preprocess} == {**own.preprocess}
    if name == "model.safetensors":
        chex.assert_trees_all_equal(mf.load(there).params, own.params)  # the folder, too


def test_a_stablehlo_file_is_refused_as_weights(run, tmp_path):
    export.export(mf.load(run), tmp_path / "w.stablehlo", format="stablehlo")
    shutil.copy(tmp_path / "w.stablehlo", tmp_path / "w.npz")
    for name in ("w.stablehlo", "w.npz"):
        assert refusal(str(tmp_path / name)) == (
            f"{tmp_path / name} is a stablehlo file, from which no weights can be read: export the run again, with "
            "--format=npz or safetensors"
        )
    assert "neither npz nor safetensors" in refusal(str(tmp_path / "w.stablehlo.json"))


def test_metadata_that_is_incomplete_is_completed_and_said(tmp_path, capsys):
    params = mf.load(TIMM).params
    write_npz(
        tmp_path / "w.npz", params, metadata={"preprocess": {"mean": [0.1]}, "class_names": [*"abcdefghij"]}
    )
    capsys.readouterr()
    model = mf.load(tmp_path / "w.npz")
    assert model.preprocess["mean"] == [0.1] and model.preprocess["interpolation"] == "bilinear"
    assert model.class_names == tuple("abcdefghij") and model.module.gelu == "tanh"
    out = capsys.readouterr().out
    assert (
        "assumed from their layout: model.gelu=tanh, preprocess.interpolation=bilinear, preprocess.std=(0.5,)"
        in out
    )


def test_metadata_from_a_later_version_is_not_used_and_said(tmp_path, capsys):
    write_npz(tmp_path / "w.npz", mf.load(TIMM).params, metadata={"model": {}, "preprocess": {"warp": "pad"}})
    assert "warp" not in mf.load(tmp_path / "w.npz").preprocess
    assert "not known to this version, and not used: warp" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [("interpolation", "lanczos"), ("interpolation", []), ("mean", "abc"), ("mean", [0.5, 0.5]), ("std", [0.0]),
     ("std", 0.5), ("std", [float("nan")]), ("std", []), ("crop_fraction", 1.5), ("crop_fraction", None)],
)  # fmt: skip
def test_metadata_that_no_model_can_use_is_refused_by_key_and_value(tmp_path, key, value):
    metadata = {"model": {}, "preprocess": {key: value}}
    write_safetensors(tmp_path / "w", mf.load(TIMM).params, metadata=metadata)
    with pytest.raises(
        UserError, match=f"metadata of .*w has preprocess.{key}=.*, which cannot be used: write"
    ):
        mf.load(tmp_path / "w")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"num_classes": 1000}, "num_classes=1000, but its arrays have 10"),
     ({"model": {"hidden_dim": 512}}, "hidden_dim=512, but its arrays have 32"),
     ({"model": {"num_blocks": "3"}}, "num_blocks='3', but its arrays have 3")],
)  # fmt: skip
def test_metadata_that_contradicts_the_arrays_is_refused(tmp_path, metadata, message):
    write_safetensors(tmp_path / "w", mf.load(TIMM).params, metadata=metadata)
    assert (
        refusal(str(tmp_path / "w")) == f"the metadata of {tmp_path}/w says {message}: write the file again"
    )


# Folders of the hub's layout


@pytest.mark.parametrize("given", ["{folder}", "{folder}/", "{folder}/model.safetensors"])
def test_a_folder_with_the_files_of_a_hub_model_is_weights(tmp_path, given):
    shutil.copy(TIMM, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = given.format(folder=tmp_path)
    assert pretrained.describe(source)["preprocess"]["mean"] == (0.1, 0.1, 0.1)
    model = mf.load(source)
    assert model.preprocess["crop_fraction"] == 0.9 and model.config == {}
    chex.assert_trees_all_equal(model.params, mf.load(TIMM).params)
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), model.params)
    chex.assert_trees_all_equal(pretrained.load(source, like), model.params)
    assert named_run(source) is None


def test_of_such_a_folder_config_json_may_be_missing(tmp_path):
    shutil.copy(TIMM, tmp_path / "model.safetensors")
    weights = find(tmp_path)
    assert weights.metadata["preprocess"]["mean"] == (0.5,)
    assert "assumed from their layout" in weights.notes[0]


def test_a_config_json_belongs_to_no_other_file_beside_it(tmp_path):
    shutil.copy(TIMM, tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert find(tmp_path / "mine.safetensors").metadata["preprocess"]["mean"] == (0.5,)


FOLDERS = {
    "empty": ({}, "give the directory that --workdir named in training, or a file of weights"),
    "config only": ({"config.json": CONFIG}, "give the directory that --workdir named"),
    "pickle": (
        {"pytorch_model.bin": b"\x80\x02}.", "config.json": CONFIG},
        "convert its pytorch_model.bin, a pickle, which runs as code, to safetensors (docs/weights.md shows how)",
    ),
    "checkpoint of PyTorch": ({"last.ckpt": b"\x80\x02}."}, "convert its last.ckpt, a pickle"),
    "parts": (
        {"model.safetensors.index.json": {}, "model-00001-of-00002.safetensors": b""}, "join the parts of its weights",
    ),
    "other names": ({"b16.npz": b"", "README.md": b""}, "give the file itself, such as {folder}/b16.npz"),
    "runs": ({"run/config.json": {}}, "give the directory that --workdir named in training"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_another_folder_is_refused_with_both_possibilities(tmp_path, case):
    files, advice = FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert refusal(str(tmp_path)).startswith(
        f"{tmp_path} is neither a run directory nor a folder of weights with a model.safetensors: "
        f"{advice.format(folder=tmp_path)}"
    )


def test_a_folder_whose_files_are_damaged_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert f"{tmp_path}/config.json cannot be read" in refusal(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "a pointer of Git LFS to such a file: run git lfs pull" in refusal(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    assert "closed cannot be read (Permission denied)" in refusal(str(tmp_path / "closed"))


# Runs


@pytest.mark.parametrize(
    ("ending", "which", "step"),
    [("@ema", "ema", 20), ("@last", "last", 20), ("@best", "best", 10), ("@10", "10", 10), ("@20", "20", 20)],
)  # fmt: skip
def test_the_end_of_a_name_chooses_the_weights_of_a_run(run, ending, which, step):
    found, params = read_weights(run, which)
    assert found == step
    source = f"{run}{ending}"
    model = mf.load(source)
    assert model.step == step and model.config
    chex.assert_trees_all_equal(model.params, params)
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(pretrained.load(source, like), params)
    if which in ("10", "20"):
        for checkpoint in (which, int(which)):
            chex.assert_trees_all_equal(mf.load(run, checkpoint=checkpoint).params, params)


def test_a_step_of_a_run_has_its_ema_if_the_run_keeps_one(run, tmp_path):
    chex.assert_trees_all_equal(mf.load(f"{run}@20").params, read_weights(run, "ema")[1])
    plain = make_run(tmp_path / "plain", ema=0.0)
    chex.assert_trees_all_equal(mf.load(f"{plain}@20").params, read_weights(plain, "last")[1])


def test_weights_that_a_run_does_not_have_are_listed(run):
    for which in ("15", "bets", "-1", "20.0", "020"):
        assert refusal(f"{run}@{which}") == (
            f"{run} has no weights {which!r}: choose one of last, best, ema, or a step it has saved (10, 20)"
        )


def test_a_directory_whose_own_name_has_an_at_sign_is_found_first(run, tmp_path):
    odd = shutil.copytree(run, tmp_path / "run@best")
    shutil.copytree(run, tmp_path / "run")
    assert named_run(odd) == (odd, None) and mf.load(odd, checkpoint="last").step == 20
    assert named_run(f"{odd}@10") == (odd, "10") and mf.load(f"{odd}@10").step == 10
    assert named_run(str(tmp_path / "run@last")) == (tmp_path / "run", "last")
    shutil.copy(TIMM, tmp_path / "w@best")
    assert named_run(tmp_path / "w@best") is None and mf.load(tmp_path / "w@best").channels == 3


def test_a_checkpoint_folder_is_refused_with_the_name_to_give(run):
    assert refusal(f"{run}/checkpoints/10").endswith(f", but a checkpoint: give {run}@10")


def test_two_ways_to_choose_may_not_contradict_each_other(run):
    with pytest.raises(
        UserError, match="@best and checkpoint='ema' name different weights: leave one of them out"
    ):
        mf.load(f"{run}@best", checkpoint="ema")
    assert mf.load(f"{run}@best", checkpoint="best").step == 10


# Addresses


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, and no network; returns a function that puts a file into the cache, as if downloaded."""
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # nothing listens there

    def put(url, file):
        place = download.cache_file(url)
        place.parent.mkdir(parents=True)
        shutil.copy(file, place)

    return put


@pytest.mark.parametrize("source", ["imagenet21k/Mixer-B_16", "https://example.org/w.npz"])
def test_a_download_that_fails_names_the_ways_without_one(no_network, tmp_path, source):
    with pytest.raises(UserError) as caught:
        mf.load(source)
    message = str(caught.value)
    assert (
        message.startswith(PUBLISHED[source].url if source in PUBLISHED else source) and "\n" not in message
    )
    for part in ("cannot be downloaded (", "--config.init_from=PATH in training", "--weights=PATH",
                 f"{tmp_path}/cache (MLPMIXER_CACHE", "train from random weights, with --config.init_from="):  # fmt: skip
        assert part in message


def test_a_published_file_is_known_by_its_url_too(no_network):
    url = PUBLISHED["gsam/Mixer-S_32"].url
    for address in (url, f"{url}#sha256={'0' * 64}"):
        no_network(address, GOLDEN / "google_tiny.npz")
        weights = find(address)
        assert weights.metadata == PUBLISHED["gsam/Mixer-S_32"].origin and weights.notes == ()


def test_a_files_address_on_the_hub_is_read_and_its_config_is_pointed_to(no_network):
    url = "https://huggingface.co/someone/mixer/resolve/v1/model.safetensors?download=true"
    no_network(url, TIMM)
    assert "for the config.json of these weights, give hf-hub:someone/mixer@v1" in find(url).notes
    google = "https://huggingface.co/timm/mixer_b16_224.goog_in21k/resolve/main/model.safetensors"
    no_network(google, TIMM)
    assert find(google).metadata["model"]["gelu"] == "tanh" and find(google).notes == ()
