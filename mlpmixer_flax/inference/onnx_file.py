"""Writes a model as ONNX, node by node: the graph has one node per operation of the model, and its names."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing, write_json
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.remote import shown

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # of files with this opset, so that older runtimes read them
MAX_BYTES = 2**31 - 1  # of a protocol buffer
_GELU = {"tanh": "tanh", "erf": "none"}  # model.gelu -> the attribute `approximate`
_PROBABILITIES = {"softmax": "Softmax", "sigmoid": "Sigmoid"}  # loss -> operation


def write_onnx(path: Path, model: Model, *, metadata: dict[str, Any]) -> list[str]:
    """Writes the model with its weights, `flip` and the metadata, and the metadata also as JSON beside it.

    The graph maps "images", uint8 (b, h, w, c), for any b, already squares of the model's size, to
    "probabilities", float32 (b, classes). It computes in float32. Returns notes for the user.

    Raises:
      UserError: onnx is not installed, the weights are too large for a file, or a file cannot be written.
    """
    try:
        import onnx
    except ImportError:
        raise UserError('format=onnx needs onnx: run pip install "mlpmixer-flax[onnx]"') from None
    graph = _Graph()
    graph.add_model(model)
    size_bytes = sum(array.nbytes for array in graph.arrays.values())
    if size_bytes > MAX_BYTES - 2**20:
        raise UserError(
            f"weights of {size_bytes:,} bytes do not fit in an onnx file: choose format=stablehlo"
        )
    size_px, types = model.preprocess["image_size_px"], onnx.TensorProto
    images = (types.UINT8, ["b", size_px, size_px, model.channels])
    probabilities = (types.FLOAT, ["b", len(model.class_names)])
    file_content = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node(kind, inputs, [name], name, **more)
                for kind, inputs, name, more in graph.nodes
            ],
            "mlp_mixer",
            [onnx.helper.make_tensor_value_info("images", *images)],
            [onnx.helper.make_tensor_value_info("probabilities", *probabilities)],
            [onnx.numpy_helper.from_array(array, name) for name, array in graph.arrays.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mlpmixer-flax",
    )
    onnx.helper.set_model_props(file_content, {"mlpmixer_flax": json.dumps(metadata)})
    onnx.checker.check_model(file_content)
    beside = Path(f"{path}.json")
    with replacing(beside) as description, replacing(path) as file:
        write_json(description, metadata)
        file.write(file_content.SerializeToString())
    notes = [
        f"class names and preprocessing -> {shown(beside)}",
        f"takes images uint8 (b, {size_px}, {size_px}, {model.channels}): --help shows how to use the file",
    ]
    if np.dtype(model.module.dtype) != np.float32:
        notes.append(f"the file computes in float32, the model in {np.dtype(model.module.dtype).name}")
    return notes


class _Graph:
    """Nodes in the order of execution, each (operation, names of inputs, name of output, attributes), and arrays."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.arrays: dict[str, np.ndarray] = {}

    def node(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""
        self.nodes.append((kind, list(inputs), name, attributes))
        return name

    def array(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """Adds a constant, and returns its name."""
        self.arrays[name] = np.asarray(values, dtype)
        return name

    def add_model(self, model: Model) -> None:
        """Adds all nodes of a model, from "images" to "probabilities"."""
        module, params = model.module, model.params
        x = self.add_stem(model)
        for number in range(module.num_blocks):
            x = self.add_block(
                x, params[f"MixerBlock_{number}"], name=f"MixerBlock_{number}", gelu=module.gelu
            )
        x = self.add_norm(x, params["pre_head_layer_norm"], name="pre_head_layer_norm")
        x = self.node("ReduceMean", x, self.array("token_axis", [1], np.int64), name="pooled", keepdims=0)
        logits = self.add_dense(x, params["head"], name="head")
        if model.flip:  # first all images, then all mirror images
            parts = self.array("flip/parts", [2, -1, len(model.class_names)], np.int64)
            logits = self.node("Reshape", logits, parts, name="flip/logits")
            logits = self.node(
                "ReduceMean", logits, self.array("flip/axis", [0], np.int64), name="flip/mean", keepdims=0
            )
        self.node(
            _PROBABILITIES[model.loss],
            logits,
            name="probabilities",
            **({"axis": -1} if model.loss == "softmax" else {}),
        )

    def add_stem(self, model: Model) -> str:
        """Adds normalization and the stem, whose convolution is a matrix product over the pixels of a patch."""
        (height, width), size_px = model.module.patches["size"], model.preprocess["image_size_px"]
        rows, columns = size_px // height, size_px // width
        parts = self.array("stem/parts", [-1, rows, height, columns, width, model.channels], np.int64)
        images = self.add_mirror_images() if model.flip else "images"
        x = self.node("Reshape", images, parts, name="stem/cut")
        x = self.node("Transpose", x, name="stem/patches", perm=[0, 1, 3, 2, 4, 5])
        x = self.node("Cast", x, name="pixels", to=1)
        # (pixel / 255 - mean) / std
        mean, std = (np.asarray(model.preprocess[key], np.float32) for key in ("mean", "std"))
        x = self.node("Div", x, self.array("levels", 255), name="normalize/in_0_1")
        x = self.node("Sub", x, self.array("mean", mean), name="normalize/centred")
        x = self.node("Div", x, self.array("std", std), name="normalize")
        kernel = np.asarray(model.params["stem"]["kernel"])
        flat = self.array("stem/tokens", [-1, rows * columns, kernel[..., 0].size], np.int64)
        x = self.node("Reshape", x, flat, name="stem/flat")
        flat_kernel = kernel.reshape(-1, kernel.shape[-1])
        return self.add_dense(x, {"kernel": flat_kernel, "bias": model.params["stem"]["bias"]}, name="stem")

    def add_mirror_images(self) -> str:
        """Adds the mirror images after the images, in one batch of twice as many."""
        width = {"starts": -1, "ends": -(2**63), "axes": 2, "steps": -1}  # from its end to its start
        arrays = [self.array(f"flip/{key}", [value], np.int64) for key, value in width.items()]
        mirrored = self.node("Slice", "images", *arrays, name="flip/mirrored")
        return self.node("Concat", "images", mirrored, name="flip/images", axis=0)

    def add_block(self, x: str, params: Any, *, name: str, gelu: str) -> str:
        y = self.add_norm(x, params["LayerNorm_0"], name=f"{name}/LayerNorm_0")
        y = self.node("Transpose", y, name=f"{name}/to_channels", perm=[0, 2, 1])
        y = self.add_mlp(y, params["token_mixing"], name=f"{name}/token_mixing", gelu=gelu)
        y = self.node("Transpose", y, name=f"{name}/to_tokens", perm=[0, 2, 1])
        x = self.node("Add", x, y, name=f"{name}/tokens_mixed")
        y = self.add_norm(x, params["LayerNorm_1"], name=f"{name}/LayerNorm_1")
        y = self.add_mlp(y, params["channel_mixing"], name=f"{name}/channel_mixing", gelu=gelu)
        return self.node("Add", x, y, name=name)

    def add_mlp(self, x: str, params: Any, *, name: str, gelu: str) -> str:
        x = self.add_dense(x, params["Dense_0"], name=f"{name}/Dense_0")
        x = self.node("Gelu", x, name=f"{name}/gelu", approximate=_GELU[gelu])
        return self.add_dense(x, params["Dense_1"], name=f"{name}/Dense_1")

    def add_dense(self, x: str, params: Any, *, name: str) -> str:
        x = self.node("MatMul", x, self.array(f"{name}/kernel", params["kernel"]), name=f"{name}/product")
        return self.node("Add", x, self.array(f"{name}/bias", params["bias"]), name=name)

    def add_norm(self, x: str, params: Any, *, name: str) -> str:
        arrays = [self.array(f"{name}/{key}", params[key]) for key in ("scale", "bias")]
        return self.node("LayerNormalization", x, *arrays, name=name, axis=-1, epsilon=1e-6)
