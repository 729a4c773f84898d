"""Models loaded by name: runs and files give the same model, and wrong ones are refused."""

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from ml_collections import ConfigDict

from mlpmixer_flax import UserError, export
from mlpmixer_flax.cli import add_model, load_model
from mlpmixer_flax.config import resolve
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.inference.classes import IMAGENET21K_NAMES, imagenet_names, in_words
from mlpmixer_flax.inference.embedding import features_of_split
from mlpmixer_flax.inference.load import load, load_run
from mlpmixer_flax.inference.scores import open_split, score_images
from mlpmixer_flax.inference.shuffling import symmetry
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.rundir import write_run
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.evaluation import make_eval_step
from mlpmixer_flax.training.step import TrainState
from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.files import write_npz
from mlpmixer_flax.weights.source import find

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = ("hidden_dim", "tokens_mlp_dim", "channels_mlp_dim")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run of random weights that keeps an EMA and whose best checkpoint is not the last."""
    values = {"hidden_dim": 16, "num_blocks": 1, "gelu": "erf"}
    overrides = [f"--config.model.{key}={value}" for key, value in values.items()]
    config = resolve(
        load_config("digits.py", ["--config.loss=sigmoid", "--config.ema_decay=0.9", *overrides]), {}
    )
    workdir = tmp_path_factory.mktemp("models") / "run"
    write_run(workdir, config.to_dict(), class_names=list("0123456789"))
    model, rng = MlpMixer(num_classes=10, **config.model.to_dict()), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    checkpoints = Checkpoints(workdir, keep=2)
    for step, accuracy in [(10, 0.9), (20, 0.8)]:
        params, ema = (
            jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.3, jnp.float32), shapes)
            for _ in range(2)
        )
        checkpoints.save(step, TrainState(jnp.asarray(step), params, (), ema), {"test/accuracy": accuracy})
    checkpoints.close()
    return workdir


def probabilities_of(model, images):
    return np.asarray(jax.jit(model.probabilities)(model.params, images))


@pytest.fixture(scope="module")
def digits():
    return open_examples("digits", "test")


def named(*arguments):
    parser = argparse.ArgumentParser()
    add_model(parser)
    return load_model(parser.parse_args(arguments))


def copy_with(run, copy, **changes):
    shutil.copytree(run, copy)
    config = json.loads((run / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_a_run_of_an_earlier_version_which_lacks_keys_is_used_like_others(run, tmp_path):
    model = load(run)
    copy = copy_with(run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for section, key in ((config, "resolutions_px"), (config, "best_by"), (config["preprocess"], "fit")):
        del section[key]
    (copy / "config.json").write_text(json.dumps(config))
    earlier, photo = load(copy), np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert (earlier.config, earlier.resolutions_px) == (model.config, ())
    assert earlier.predict(photo) == model.predict(photo)
    for each, name in ((earlier, "earlier"), (model, "now")):
        export.export(each, tmp_path / name / "hub", format="hub")
    for file in ("config.json", "README.md"):
        now, before = ((tmp_path / name / "hub" / file).read_text() for name in ("now", "earlier"))
        assert now == before


def test_an_ema_that_a_run_does_not_keep_is_refused(run, tmp_path):
    copy = copy_with(run, tmp_path / "copy", ema_decay=0.0)
    shutil.rmtree(copy / "checkpoints")
    _, params = read_weights(run)
    checkpoints = Checkpoints(copy, keep=1)
    checkpoints.save(5, TrainState(jnp.asarray(5), params, (), None), None)
    checkpoints.close()
    assert load(copy).step == 5
    with pytest.raises(UserError, match="keeps no EMA of its weights: choose last or best"):
        load(copy, checkpoint="ema")


def test_a_run_gives_its_best_weights_unless_others_are_named(run, tmp_path):
    for options, which in [((), "best"), (["--checkpoint=last"], "last"), (["--checkpoint=ema"], "ema")]:
        step, params = read_weights(run, which)
        model = named(f"--workdir={run}", *options)
        chex.assert_trees_all_equal(model.params, params)
        assert model.step == step
    for ema_decay, which in [(0.0, "last"), (0.9, "ema")]:  # without scores, those that would be evaluated
        copy = copy_with(run, tmp_path / which, ema_decay=ema_decay)
        for metrics in copy.glob("checkpoints/*/metrics"):
            shutil.rmtree(metrics)
        chex.assert_trees_all_equal(load_run(copy).params, read_weights(run, which)[1])


def test_a_run_is_found_by_text_or_path_with_a_tilde(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    for source in (f"~/{run.name}", Path("~") / run.name, run, str(run)):
        assert load(source).step == load_run(source).step == 10  # the best
        assert load_run(source).name == str(run)
    assert load(f"~/{run.name}@last").step == 20


def test_probabilities_are_those_that_training_evaluates(run, digits):
    model = load_run(run)
    probabilities = np.float64(probabilities_of(model, digits.images))
    assert probabilities.shape == (364, 10) and model.channels == 1
    batch = {"image": digits.images, "label": digits.labels, "mask": np.ones(364, bool)}
    sums = jax.jit(make_eval_step(model.module, ConfigDict(model.config), mesh=sharding.make_mesh()))(
        model.params, batch
    )
    right = np.arange(10) == digits.labels[:, None]
    loss = -np.log(np.where(right, probabilities, 1 - probabilities)).sum()
    assert loss == pytest.approx(float(sums["loss"]), rel=1e-4)
    assert np.sum(probabilities.argmax(axis=1) == digits.labels) == sums["accuracy"]


def test_probabilities_sum_to_one_with_the_softmax_loss(run, digits, tmp_path):
    softmax = probabilities_of(load_run(copy_with(run, tmp_path / "copy", loss="softmax")), digits.images[:9])
    np.testing.assert_allclose(softmax.sum(axis=1), 1, rtol=1e-6)
    sigmoid = probabilities_of(load_run(run), digits.images[:9])
    assert (abs(sigmoid.sum(axis=1) - 1) > 1e-3).all()
    np.testing.assert_array_equal(softmax.argsort(axis=1), sigmoid.argsort(axis=1))


def test_results_that_are_not_finite_are_refused(run, digits):
    model = load_run(run)
    stem = model.params["stem"] | {"kernel": np.full_like(model.params["stem"]["kernel"], 3e38)}
    model = dataclasses.replace(
        model, params={**model.params, "stem": stem}
    )  # finite, but sums of them are not
    examples, classes = open_split(model, "digits", "test[:9]")
    for name, compute in [
        ("probabilities", lambda: model.predict(digits.images[:3])),
        ("features", lambda: model.features(digits.images[:3])),
        ("confidence", lambda: score_images(model, examples, classes=classes)),
        ("features", lambda: features_of_split(model, examples)),
        ("logits", lambda: symmetry(model)),
    ]:
        with pytest.raises(
            UserError, match=rf"not finite \({name}: nan\), because its weights are too large"
        ):
            compute()


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_an_exported_file_is_the_same_model_as_its_run(run, tmp_path, format):
    file = tmp_path / "weights"
    options = [f"--format={format}", f"--output={file}", "--checkpoint=ema"]
    assert export.main([f"--workdir={run}", *options]) == 0
    ours, theirs = load_run(run, "ema"), named(f"--weights={file}")
    chex.assert_trees_all_equal(theirs.params, ours.params)
    assert theirs.class_names == ours.class_names == tuple("0123456789")
    assert theirs.module.gelu == "erf" and theirs.module.patches["size"] == (2, 2)
    assert {**theirs.preprocess} == {**ours.preprocess}
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    np.testing.assert_array_equal(probabilities_of(theirs, images), probabilities_of(ours, images))


def test_a_run_is_the_same_model_by_either_option(run):
    one, other = named(f"--workdir={run}"), named(f"--weights={run}")
    chex.assert_trees_all_equal(one.params, other.params)
    assert (one.loss, one.class_names, one.module) == (other.loss, other.class_names, other.module)


def test_a_file_keeps_the_precision_and_the_loss_that_its_run_computes_with(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    copy = copy_with(run, tmp_path / "copy", model={**config["model"], "dtype": "bfloat16"})
    export.export(load_run(copy), tmp_path / "w.npz", format="npz")
    theirs = load(str(tmp_path / "w.npz"))
    assert (theirs.module.dtype, theirs.loss) == ("bfloat16", "sigmoid")
    write_npz(tmp_path / "w.npz", theirs.params, metadata={"loss": "hinge", "model": {}, "preprocess": {}})
    with pytest.raises(UserError, match="loss 'hinge'"):
        load(str(tmp_path / "w.npz"))


def test_a_run_with_a_thousand_classes_has_no_names_of_imagenet(tmp_path, capsys):
    module = MlpMixer(num_classes=1000, patches={"size": (4, 4)}, **dict.fromkeys(SIZES, 8), num_blocks=1)
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    own = {"model": {"gelu": "tanh"}, "preprocess": {}, "num_classes": 1000}
    for metadata, first in [({}, "tench, Tinca tinca"), (own, "0")]:
        write_npz(tmp_path / "w.npz", jax.device_get(params), metadata=metadata)
        assert load(str(tmp_path / "w.npz")).class_names[0] == first
        assert ("those of ImageNet are used, because there are 1,000 classes" in capsys.readouterr().out) == (
            not metadata
        )
    write_npz(tmp_path / "w.npz", jax.device_get(params), metadata={**own, "class_names": ["a", "b"]})
    with pytest.raises(UserError, match="contradicts itself .*2 names for 1000 classes"):
        load(str(tmp_path / "w.npz"))


@pytest.mark.parametrize("file", ["google_tiny.npz", "timm_tiny.safetensors"])
def test_sizes_of_a_file_without_metadata_are_read_from_its_shapes(file):
    model = load(GOLDEN / file)
    assert model.preprocess["image_size_px"] == 32 and model.preprocess["crop_fraction"] == 0.875
    assert model.class_names == tuple("0123456789") and model.channels == 3
    assert model.module.gelu == ("erf" if file.startswith("timm") else "tanh")


def test_weights_without_a_head_or_blocks_are_refused(run, tmp_path):
    params = load_run(run).params
    write_npz(tmp_path / "w.npz", {k: v for k, v in params.items() if k != "head"}, metadata={})
    with pytest.raises(UserError, match="w.npz has no head: give weights with a head, or train one"):
        load(str(tmp_path / "w.npz"))
    write_npz(tmp_path / "x.npz", {"head": params["head"], "stem": params["stem"]}, metadata={})
    with pytest.raises(UserError, match="x.npz has no Mixer blocks"):
        load(str(tmp_path / "x.npz"))


def test_exactly_one_option_names_a_model(run, capsys):
    for arguments in ([], [f"--workdir={run}", "--weights=w.npz"]):
        with pytest.raises(SystemExit):
            named(*arguments)
    assert "--weights" in capsys.readouterr().err
    with pytest.raises(UserError, match="--checkpoint=best is for --workdir only: leave it out"):
        named("--weights=w.npz", "--checkpoint=best")
    with pytest.raises(
        UserError, match="checkpoint='best' is for run directories only: leave it out for .*timm_tiny"
    ):
        load(GOLDEN / "timm_tiny.safetensors", checkpoint="best")
    with pytest.raises(UserError, match="no run in nowhere"):
        named("--workdir=nowhere")
    for nothing in ("nowhere", "x" * 300, "~nobody-at-all/w.npz"):
        with pytest.raises(UserError, match=f"no weights '{nothing}'"):
            load(nothing)


def test_the_config_of_another_program_is_not_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "mixer_b16_224"}')
    with pytest.raises(UserError, match=f"no run in {tmp_path}"):
        load_run(tmp_path)


def test_names_of_imagenet_are_in_the_order_of_its_classes():
    names = imagenet_names(1000)
    assert len(names) == 1000 and all(name.isascii() and name == name.strip() for name in names)
    known = {
        0: "tench, Tinca tinca",
        281: "tabby, tabby cat",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {label: names[label] for label in known} == known
    assert in_words(["n02123045", "n9", "cat"]) == ["tabby, tabby cat", "n9", "cat"]
    assert imagenet_names(3) == ["0", "1", "2"]


def test_names_of_imagenet_21k_are_downloaded_and_are_numbers_without_a_network(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    numbers = [str(number) for number in range(21843)]
    assert imagenet_names(21843) == numbers
    note = capsys.readouterr().err
    assert "shown by number, because their names cannot be downloaded: " in note
    assert "https://storage.googleapis.com" in note
    names = [f"name {number}, épée" for number in numbers]
    file = download.cache_file(IMAGENET21K_NAMES)
    file.write_text("\n".join(names) + "\n", encoding="utf-8")
    assert imagenet_names(21843) == names
    file.write_text("\n".join(names[1:]))
    assert imagenet_names(21843) == numbers
    assert capsys.readouterr().err == ""


def test_a_file_that_claims_a_thousand_blocks_is_refused_at_once(tmp_path):
    arrays = {
        "stem/kernel": np.zeros((2, 2, 3, 4), np.float32),
        "head/kernel": np.zeros((4, 3), np.float32),
        "MixerBlock_0/token_mixing/Dense_0/kernel": np.zeros((4, 3), np.float32),
        "MixerBlock_0/channel_mixing/Dense_0/kernel": np.zeros((4, 5), np.float32),
    }
    arrays |= {f"MixerBlock_{i}/LayerNorm_0/scale": np.zeros(4, np.float32) for i in range(1, 1000)}
    np.savez(tmp_path / "w.npz", **arrays)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be adapted to the model:\n.*missing in the weights"):
        load(tmp_path / "w.npz")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hinge"}, "config.json is damaged .unknown loss 'hinge': choose one of"),
        ({"dataset": 5}, "config.json is damaged .dataset=5 has the wrong type"),
        ({"dataset": ""}, "config.json is damaged .dataset is empty: give the name of one"),
        ({"model": 5}, "config.json has no model.channels_mlp_dim: restore the file, or choose another run"),
        ({"preprocess": {"image_size_px": 10**9}}, "image_size_px=1000000000 must be at most 4096, because"),
        ({"preprocess": {"image_size_px": 16}}, "contradicts itself.*token_mixing/Dense_0/kernel"),
        (
            {"num_blocks": 3},
            "contradicts itself: config.json and class_names.json are of another model .*num_bl",
        ),
    ],
    ids=str,
)
def test_a_run_whose_config_is_damaged_is_refused(run, tmp_path, changes, message):
    if "num_blocks" in changes:
        changes = {"model": json.loads((run / "config.json").read_text())["model"] | changes}
    with pytest.raises(UserError, match=message):
        load(copy_with(run, tmp_path / "copy", **changes))


@pytest.mark.parametrize(
    ("patch_px", "side", "message"),
    [
        (64, 256, "preprocess.image_size_px=16384 must be at most 4096"),
        (8, 257, "66,049 patches of 8x8 px, but more than 65,536 do not fit into memory"),
    ],
)
def test_weights_for_images_that_do_not_fit_into_memory_are_refused(tmp_path, patch_px, side, message):
    """A small file may be for such images: its arrays compress well, or each patch is large."""
    tokens = side**2
    module = MlpMixer(3, {"size": (patch_px, patch_px)}, 1, 1, 1, 1)
    params = module.init(jax.random.key(0), np.zeros((1, patch_px, patch_px, 1), np.float32))["params"]
    mixing = params["MixerBlock_0"]["token_mixing"]
    mixing["Dense_0"]["kernel"] = np.zeros((tokens, 1), np.float32)
    mixing["Dense_1"] = {"kernel": np.zeros((1, tokens), np.float32), "bias": np.zeros(tokens, np.float32)}
    write_npz(tmp_path / "w.npz", params, metadata={})
    with pytest.raises(UserError, match=message):
        load(tmp_path / "w.npz")


def declare(folder, array, shape, chunks):
    """Replaces an array of weights by one of any size that has only its default values, and takes no space."""
    place = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{array}/"}
    metadata = {"shape": shape, "chunks": chunks, "dtype": "<f4", "fill_value": 1.0}
    spec = {"driver": "zarr", "kvstore": place, "metadata": metadata | {"compressor": None}}
    tensorstore.open(spec, create=True, delete_existing=True).result()


@pytest.mark.parametrize(
    ("array", "shape", "chunks", "message"),
    [
        ("head.kernel", (10**12, 10), (100, 10), r"contradicts itself: .* than the weights \(head/kernel\)"),
        ("head.kernel", (16, 10**12), (16, 100), r"contradicts itself: .* \(classes\)"),
        ("stem.kernel", (2, 2, 10**12, 16), (2, 2, 100, 16), r"contradicts itself: .* \(channels\)"),
        (
            "head.bias",
            (10,),
            (10**12,),
            "cannot be read .its array head/bias is stored in parts larger than it",
        ),
    ],
)
@pytest.mark.parametrize("reads", [load, find])
def test_arrays_that_contradict_the_config_are_not_read(run, tmp_path, reads, array, shape, chunks, message):
    """Otherwise a small file of zeros could fill the memory."""
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints" / "10" / "xxh3_128.json").unlink()
    declare(copy / "checkpoints" / "10" / "weights", f"ema.{array}", shape, chunks)
    with pytest.raises(UserError, match=message):
        reads(str(copy))


def test_keys_of_a_later_version_are_named_and_not_used(run, tmp_path, capsys):
    load(copy_with(run, tmp_path / "copy", **{"new\x1b[31m": 1}))
    assert "config.json: not known to this version, and not used: new\\x1b[31m\n" in capsys.readouterr().out
