"""Measures how fast an exported ONNX file predicts in ONNX Runtime and OpenVINO, beside JAX and timm in PyTorch.

    pip install torch==2.13.0 timm onnx onnxruntime openvino
    python benchmarks/onnx_speed.py
    python benchmarks/onnx_speed.py --workdir=RUN --splits 'train[:512]' test

The first command measures the speed of S/16 at 224 px with random weights, from uint8 images to probabilities. Each row
is measured in a process of its own, after two calls that are not counted. The second command measures instead the
accuracy of a run in each precision; the first split is for the calibration of int8, the second is scored. int8 files
are made by onnxruntime's own tools from the exported file: "dynamic" has int8 weights, and scales of activations found
while it runs; "calibrated" has scales found in advance, from the first split (for the speed, from random images).
ONNX Runtime has no bfloat16 products on x86. Use a machine without other work. Results: docs/weights.md
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlpmixer_flax.ending import exit_status, leave

os.environ["JAX_PLATFORMS"] = "cpu"
THREADS = len(os.sched_getaffinity(0))

Predict = Callable[
    [np.ndarray], np.ndarray
]  # uint8 (n, h, w, c) -> (n, classes), of which the largest is the result


def in_jax(folder: Path, dtype: str) -> Predict:
    import jax

    import mlpmixer_flax as mf

    model = mf.load(folder / "hub")
    model = dataclasses.replace(model, module=model.module.clone(dtype=dtype))
    params, predict = jax.device_put(model.params), jax.jit(partial(model.probabilities, cropped=True))
    return lambda images: np.asarray(predict(params, images))


def in_torch(folder: Path, dtype: str, *, compiled: bool) -> Predict:
    import timm
    import torch

    torch.set_num_threads(THREADS)
    config = json.loads((folder / "hub" / "config.json").read_text())
    gelu = {"gelu": torch.nn.GELU, "gelu_tanh": timm.layers.GELUTanh}[config["act_layer"]]
    sizes = {
        "patch_size": 16,
        "num_blocks": 8,
        "embed_dim": 512,
        **config["model_args"],
    }  # else those of S/16
    model = timm.models.mlp_mixer.MlpMixer(num_classes=config["num_classes"], act_layer=gelu, **sizes).eval()
    timm.models.load_checkpoint(model, folder / "hub" / "model.safetensors")
    mean, std = (torch.tensor(config["pretrained_cfg"][key])[:, None, None] for key in ("mean", "std"))

    def forward(images):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model((images.permute(0, 3, 1, 2) / 255 - mean) / std).softmax(-1)

    call = torch.compile(forward) if compiled else forward

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return call(torch.from_numpy(images)).float().numpy()

    return predict


def in_onnxruntime(folder: Path, file: str) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def in_openvino(folder: Path, file: str, precision: str) -> Predict:
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model(folder / file, "CPU", hints)
    return lambda images: model(images)[0]


ROWS: dict[str, Callable[[Path], Predict]] = {
    "JAX, float32": partial(in_jax, dtype="float32"),
    "JAX, bfloat16": partial(in_jax, dtype="bfloat16"),
    "torch, float32": partial(in_torch, dtype="float32", compiled=False),
    "torch, float32, compiled": partial(in_torch, dtype="float32", compiled=True),
    "torch, bfloat16": partial(in_torch, dtype="bfloat16", compiled=False),
    "torch, bfloat16, compiled": partial(in_torch, dtype="bfloat16", compiled=True),
    "ONNX Runtime, float32": partial(in_onnxruntime, file="float32.onnx"),
    "ONNX Runtime, int8 dynamic": partial(in_onnxruntime, file="dynamic.onnx"),
    "ONNX Runtime, int8 calibrated": partial(in_onnxruntime, file="calibrated.onnx"),
    "OpenVINO, float32": partial(in_openvino, file="float32.onnx", precision="f32"),
    "OpenVINO, bfloat16": partial(in_openvino, file="float32.onnx", precision="bf16"),
    "OpenVINO, int8 calibrated": partial(in_openvino, file="calibrated.onnx", precision="f32"),
}


def export_all(model: Any, folder: Path, images: np.ndarray) -> None:
    """Writes a model in float32 and int8, and as a folder for timm; `images`, uint8, are for the calibration."""
    from onnxruntime import quantization as q

    from mlpmixer_flax.export import export

    export(model, folder / "hub", format="hub")
    export(model, folder / "float32.onnx", format="onnx")
    batches = iter([{"images": images[start : start + 16]} for start in range(0, len(images), 16)])

    class Reader(q.CalibrationDataReader):
        def get_next(self):
            return next(batches, None)

    products: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
    q.quantize_dynamic(folder / "float32.onnx", folder / "dynamic.onnx", **products)
    q.quantize_static(
        folder / "float32.onnx",
        folder / "calibrated.onnx",
        Reader(),
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        **products,
    )


def prepare_speed(folder: Path) -> None:
    from timm_hub import make_model

    from mlpmixer_flax.config import mixer_s16_config

    images = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3)).astype(np.uint8)
    export_all(make_model(mixer_s16_config, "erf", size_px=224, channels=3), folder, images)
    np.savez(folder / "images.npz", images=images)


def prepare_accuracy(folder: Path, workdir: str, splits: list[str]) -> None:
    import mlpmixer_flax as mf

    model = mf.load(workdir)
    calibration, scored = (model.open(model.config["dataset"], split) for split in splits)
    assert scored.image_shape[0] == model.preprocess["image_size_px"], (
        "the images of the dataset have another size"
    )
    export_all(model, folder, calibration.read(np.arange(len(calibration)))[0])
    images, labels = scored.read(np.arange(len(scored)))
    np.savez(folder / "images.npz", images=images, labels=labels)


def measure(predict: Predict, folder: Path, *, batch_size: int, seconds: float) -> str:
    """Returns the cells of a row: accuracy in % if there are labels, else best and median images per second."""
    data = np.load(folder / "images.npz")
    images = data["images"]
    if "labels" in data:
        parts = [predict(images[start : start + 500]) for start in range(0, len(images), 500)]
        correct = np.concatenate(parts).argmax(axis=1) == data["labels"]
        return f"{100 * correct.mean():.2f}"
    batch, times = np.ascontiguousarray(images[:batch_size]), []
    predict(batch)
    predict(batch)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        predict(batch)
        times.append(time.perf_counter() - start)
    return f"{batch_size / min(times):.1f} | {batch_size / np.median(times):.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", metavar="RUN", help="measure the accuracy of this run")
    parser.add_argument("--splits", nargs=2, default=["train[:512]", "test"], metavar="SPLIT")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="at most 16")
    parser.add_argument("--seconds", type=float, default=6.0, metavar="S", help="time per row")
    parser.add_argument("--row", choices=ROWS, help="measure only this row, of the files in --folder")
    parser.add_argument(
        "--folder", type=Path, help="the files; made if they do not exist (default: temporary)"
    )
    arguments = parser.parse_args()
    sizes = {"batch_size": arguments.batch_size, "seconds": arguments.seconds}
    if arguments.row:
        print(measure(ROWS[arguments.row](arguments.folder), arguments.folder, **sizes))
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place)
        if not (folder / "images.npz").exists():
            if arguments.workdir:
                prepare_accuracy(folder, arguments.workdir, arguments.splits)
            else:
                prepare_speed(folder)
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "timm")]
        versions += [f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "openvino")]
        print(f"{', '.join(versions)}; {THREADS} threads, batches of {arguments.batch_size}")
        columns = "accuracy, %" if arguments.workdir else "images/s, best | images/s, median"
        print(f"| with | {columns} |\n|---|---|{'' if arguments.workdir else '---|'}", flush=True)
        command = [sys.executable, __file__, f"--folder={folder}", f"--batch_size={arguments.batch_size}"]
        for row in ROWS:
            done = subprocess.run(
                [*command, f"--seconds={arguments.seconds}", f"--row={row}"], capture_output=True, text=True
            )
            cells = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "failed"
            print(f"| {row} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    leave(exit_status(main))
