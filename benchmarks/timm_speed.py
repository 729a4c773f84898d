"""Measures timm's Mixers as `python -m mlpmixer_flax.benchmark` measures ours: same table, same rules, in PyTorch.

    pip install torch==2.13.0 timm
    python benchmarks/timm_speed.py --model=b16 --batch_size=8
    python -m mlpmixer_flax.benchmark --model=b16 --batch_size=8

Training has AdamW and no augmentation. On a GPU the weights are in the channels-last layout, and autocast computes in
bfloat16; on a CPU everything is float32. Each line is measured eagerly and with torch.compile. For a comparison, run
both commands one after the other on a machine without other work, and compare the best lines of each.
Results: docs/performance.md
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = (
    "cpu"  # JAX only counts operations here, and must leave the GPU's memory to PyTorch
)

import jax
import numpy as np

try:
    import timm
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install torch==2.13.0 timm") from None

from mlpmixer_flax.benchmark import MODELS, write_figures
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.speed import HEADER, KINDS, Row, check_seconds, format_row, make_row, time_calls
from mlpmixer_flax.training.table import count_macs

CLASSES = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def wait() -> None:
    """Waits until the GPU is done; a CPU computes before a call returns."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure_product(seconds: float) -> float:
    """Returns the best rate of large matrix products in TFLOP/s."""
    best = 0.0
    for n in (1024, 2048, 4096, 8192, 16384):
        left = torch.ones((n, n), dtype=DTYPE, device=DEVICE)
        right = torch.full((n, n), 1 / n, dtype=DTYPE, device=DEVICE)

        def run(calls: int, left=left, right=right) -> None:
            for _ in range(8 * calls):
                left @ right
            wait()

        times = time_calls(run, seconds=seconds / 2)
        best = max(best, 8 * 2 * n**3 / times[0] / 1e12)
        if times[0] > seconds / 20:
            break
    return best


def training(model: torch.nn.Module, images: torch.Tensor) -> Callable[[int], None]:
    """Returns a function that runs n updates."""
    labels = torch.randint(0, CLASSES, (len(images),), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1, fused=DEVICE == "cuda")
    loss_of = torch.nn.CrossEntropyLoss()

    def run(calls: int) -> None:
        model.train()
        for _ in range(calls):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DTYPE == torch.bfloat16):
                loss = loss_of(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        wait()

    return run


def inference(model: torch.nn.Module, images: torch.Tensor) -> Callable[[int], None]:
    """Returns a function that runs n forward passes."""

    def run(calls: int) -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=DTYPE == torch.bfloat16):
            for _ in range(calls):
                model(images)
        wait()

    return run


def make_mixer(architecture: Mapping[str, Any], size_px: int) -> torch.nn.Module:
    """Returns timm's Mixer of an architecture of `mlpmixer_flax.config`."""
    width = architecture["hidden_dim"]
    return timm.models.mlp_mixer.MlpMixer(
        num_classes=CLASSES,
        img_size=size_px,
        patch_size=architecture["patches"]["size"][0],
        num_blocks=architecture["num_blocks"],
        embed_dim=width,
        mlp_ratio=(architecture["tokens_mlp_dim"] / width, architecture["channels_mlp_dim"] / width),
    )


def measure(
    name: str, kind: str, batch_size: int, *, compiled: bool, product_tflops: float, seconds: float
) -> Row:
    """Returns the line of one model, kind and batch size."""
    architecture, size_px = MODELS[name]
    ours = MlpMixer(num_classes=CLASSES, **architecture)
    shape = (size_px, size_px, 3)
    params = jax.eval_shape(ours.init, jax.random.key(0), np.zeros((1, *shape), np.float32))["params"]
    label = f"{name} {'compiled' if compiled else 'eager'}"
    try:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = prepare(name, kind, batch_size, compiled=compiled)
        started = time.perf_counter()
        run(1)
        compile_seconds = time.perf_counter() - started
        times = time_calls(run, seconds=seconds)
    except torch.OutOfMemoryError:
        return Row(label, kind, batch_size)
    memory_mib = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else None
    return make_row(
        label,
        kind,
        batch_size,
        times,
        macs=count_macs(ours, shape, params),
        product_tflops=product_tflops,
        memory_mib=memory_mib,
        compile_seconds=compile_seconds if compiled else None,
    )


def prepare(name: str, kind: str, batch_size: int, *, compiled: bool) -> Callable[[int], None]:
    """Returns a function that runs n updates or forward passes of a model."""
    architecture, size_px = MODELS[name]
    layout = torch.channels_last if DEVICE == "cuda" else torch.contiguous_format
    model = make_mixer(architecture, size_px).to(device=DEVICE, memory_format=layout)
    images = torch.randn((batch_size, 3, size_px, size_px), device=DEVICE).to(memory_format=layout)
    make_run = {"training": training, "inference": inference}[kind]
    return make_run(torch.compile(model) if compiled else model, images)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="b16",
        metavar="NAMES",
        help="names of mlpmixer_flax.benchmark, with commas between",
    )
    parser.add_argument("--batch_size", default="8", metavar="N,...")
    parser.add_argument("--kind", choices=KINDS, help="measure only this kind (default: both)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="time per line (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    arguments = parser.parse_args()
    check_seconds(arguments.seconds)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    facts = {"device": device, "torch": torch.__version__, "timm": timm.__version__}
    print(f"{device}, torch {torch.__version__}, timm {timm.__version__}")
    product_tflops = measure_product(arguments.seconds)
    print(f"a matrix product in {str(DTYPE).removeprefix('torch.')} reaches {product_tflops:.3g} TFLOP/s")
    print(HEADER, flush=True)
    rows = []
    measure_row = partial(measure, product_tflops=product_tflops, seconds=arguments.seconds)
    for name in arguments.model.split(","):
        for kind in [arguments.kind] if arguments.kind else KINDS:
            for batch_size in map(int, arguments.batch_size.split(",")):
                for compiled in (False, True):
                    torch.compiler.reset()
                    rows.append(measure_row(name, kind, batch_size, compiled=compiled))
                    print(format_row(rows[-1]), flush=True)
                    if arguments.json:  # after each row, because the next one may take too long
                        write_figures(arguments.json, {**facts, "product_tflops": product_tflops}, rows)


if __name__ == "__main__":
    leave(exit_status(main))
