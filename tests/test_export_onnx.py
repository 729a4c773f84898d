"""An ONNX file predicts the same in ONNX Runtime as the model here, in a process that has no JAX."""

import dataclasses
import json
import re
import sys
import textwrap
from functools import partial

import jax
import numpy as np
import pytest
from elsewhere import predict_elsewhere

from mlpmixer_flax import MlpMixer, UserError, load
from mlpmixer_flax.export import __doc__ as help_text
from mlpmixer_flax.export import export, main
from mlpmixer_flax.inference import onnx_file
from mlpmixer_flax.inference.model import Model

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LINES = textwrap.dedent(re.search(r"install onnxruntime:\n\n(.*?)\n\n", help_text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def file(digits_run, tmp_path_factory):
    """Returns the file that the program writes for a run on the digits."""
    file = tmp_path_factory.mktemp("exported") / "b16.onnx"
    assert main([f"--workdir={digits_run}", "--format=onnx", f"--output={file}"]) == 0
    return file


def test_the_lines_of_the_help_predict_the_same_in_a_process_without_jax(file, digits_run, tmp_path):
    given, found = predict_elsewhere(LINES, tmp_path, cwd=file.parent, without="jax flax onnx")
    model = load(digits_run)
    for size, images in given.items():
        assert found[size].dtype == np.float32 and found[size].shape == (len(images), 10)
        np.testing.assert_allclose(
            found[size], model.probabilities(model.params, images, cropped=True), atol=1e-5
        )
    assert np.ptp(found["8"], axis=0).max() > 0.01  # the predictions differ between images


def make_model(*, gelu="tanh", loss="softmax", patch=(4, 2), channels=3, dtype="float32", flip=False):
    module = MlpMixer(
        num_classes=4,
        patches={"size": patch},
        hidden_dim=12,
        num_blocks=2,
        tokens_mlp_dim=6,
        channels_mlp_dim=10,
        gelu=gelu,
        dtype=dtype,
    )
    images = jax.ShapeDtypeStruct((1, 8, 8, channels), "float32")
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    preprocess = {"image_size_px": 8, "crop_fraction": 0.5, "interpolation": "bicubic", "fit": "pad"}
    preprocess |= {"mean": (0.1, 0.2, 0.3, 0.4)[:channels], "std": (0.7,)}
    return Model("random", module, params, preprocess, tuple("abcd"), loss, config={}, flip=flip)


@pytest.mark.parametrize(
    "options",
    [
        {"gelu": "erf"},
        {"loss": "sigmoid", "channels": 4, "patch": (1, 8)},
        {"channels": 1, "patch": (8, 8)},
        {"flip": True, "patch": (2, 4)},
        {"flip": True, "loss": "sigmoid", "channels": 1},
    ],
    ids=str,
)
def test_models_of_every_kind_predict_the_same(tmp_path, options):
    model = make_model(**options)
    export(model, tmp_path / "m.onnx", format="onnx")
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, model.channels)).astype(np.uint8)
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"images": images})
    expected = jax.jit(partial(model.probabilities, cropped=True))(model.params, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3


def test_the_file_says_what_it_takes_and_has_names_beside_it_and_in_it(file, digits_run):
    session = onnxruntime.InferenceSession(file)
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["b", 8, 8, 1])
    assert (probabilities.name, probabilities.type) == ("probabilities", "tensor(float)")
    assert probabilities.shape == ["b", 10]
    beside = json.loads((file.parent / "b16.onnx.json").read_text())
    assert json.loads(session.get_modelmeta().custom_metadata_map["mlpmixer_flax"]) == beside
    assert beside["class_names"] == list(load(digits_run).class_names)


def test_each_operation_is_one_node_with_the_name_of_its_layer(file):
    import onnx

    graph = onnx.load(file).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMul") == 2 + 4 * 2  # stem, head and four in each block
    assert kinds.count("LayerNormalization") == 1 + 2 * 2 and kinds.count("Gelu") == 2 * 2
    assert "MixerBlock_1/token_mixing/Dense_0/kernel" in {array.name for array in graph.initializer}


def test_a_model_in_bfloat16_is_written_in_float32_and_this_is_said(tmp_path):
    model = make_model(dtype="bfloat16")
    assert "the file computes in float32, the model in bfloat16" in export(
        model, tmp_path / "m", format="onnx"
    )


def test_without_the_package_or_with_too_large_weights_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 2**20 + 100)
    with pytest.raises(UserError, match="do not fit in an onnx file: choose format=stablehlo"):
        export(make_model(), tmp_path / "m", format="onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r'needs onnx: run pip install "mlpmixer-flax\[onnx\]"'):
        export(make_model(), tmp_path / "m", format="onnx")
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_text_are_kept_as_escapes(tmp_path):
    model = dataclasses.replace(make_model(), class_names=("bad\udcff\n", "ü", "c", "d"))
    export(model, tmp_path / "m", format="onnx")
    beside = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert beside["class_names"] == list(model.class_names)
