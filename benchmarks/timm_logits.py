"""Compares our logits with those of timm, for weights exported as safetensors; also checks the export as npz.

    pip install torch==2.13.0 timm
    python benchmarks/timm_logits.py

Makes run directories of Mixers S/32 and B/16 with random weights and exports them with
`python -m mlpmixer_flax.export`. Loads the safetensors into timm with `load_state_dict(strict=True)` and compares the
logits in float32. Loads the npz into our own parameter tree, which must be bit-identical.
The exit status is 1 if logits differ by more than TOLERANCE or an npz differs at all. Takes about two minutes on 2 CPU
cores. Results: docs/weights.md
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    import timm
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install torch==2.13.0 timm") from None
from safetensors.torch import load_file

from mlpmixer_flax import pretrained
from mlpmixer_flax.config import get_config, mixer_b16_config, mixer_s32_config, resolve
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.rundir import write_run
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.optimizer import Params, make_optimizer
from mlpmixer_flax.training.step import init_state

# (timm's name of the architecture, our sizes, GELU)
MODELS = [
    ("mixer_s32_224", mixer_s32_config, "erf"),
    ("mixer_s32_224", mixer_s32_config, "tanh"),
    ("mixer_b16_224", mixer_b16_config, "erf"),
]
CLASSES = 1000
TOLERANCE = 1e-4  # largest absolute difference of logits


def make_run(workdir: Path, sizes: Mapping[str, Any], gelu: str) -> tuple[MlpMixer, Params]:
    """Writes a run directory with one checkpoint of random weights, none of them 0; returns module and weights."""
    config = get_config()
    config.preprocess.image_size_px = 224
    config.model.update(sizes)
    config.model.gelu = gelu
    config.optimizer.name = "sgd"
    config = resolve(config, {})
    model = MlpMixer(num_classes=CLASSES, **config.model.to_dict())
    optimizer = make_optimizer(config, lambda step: 0.1)
    state = init_state(None, model=model, optimizer=optimizer, config=config, image_shape=(224, 224, 3))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + np.float32(0.02) * rng.normal(size=p.shape).astype(p.dtype), state.params
    )
    write_run(workdir, config.to_dict(), class_names=[str(i) for i in range(CLASSES)])
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(1, state.replace(params=params), None)
    checkpoints.close()
    return model, params


def export(workdir: Path, format: str) -> Path:
    """Exports the weights of a run; returns the file."""
    file = workdir / f"weights.{format}"
    command = [sys.executable, "-m", "mlpmixer_flax.export", f"--workdir={workdir}", f"--format={format}"]
    subprocess.run([*command, f"--output={file}"], check=True, capture_output=True)
    return file


def main() -> int:
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    images = np.random.default_rng(1).uniform(-1, 1, (8, 224, 224, 3)).astype(np.float32)
    worst = 0.0
    print(
        f"timm {timm.__version__}, torch {torch.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}"
    )
    for name, sizes, gelu in MODELS:
        timm_gelu = {"act_layer": timm.layers.GELUTanh} if gelu == "tanh" else {}
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder)
            model, params = make_run(workdir, sizes, gelu)
            ours = np.asarray(jax.jit(model.apply)({"params": params}, images))
            theirs = timm.create_model(name, num_classes=CLASSES, **timm_gelu).eval()
            theirs.load_state_dict(load_file(export(workdir, "safetensors")), strict=True)
            with torch.no_grad():
                logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
            like = jax.eval_shape(lambda params=params: params)
            loaded = pretrained.load(str(export(workdir, "npz")), like)
            same = all(jax.tree.leaves(jax.tree.map(np.array_equal, loaded, params)))
        difference = float(np.abs(ours - logits).max())
        worst = max(worst, difference) if same else float("inf")
        print(
            json.dumps(
                {
                    "model": name,
                    "gelu": gelu,
                    "largest logit": round(float(np.abs(ours).max()), 3),
                    "largest difference": float(f"{difference:.2g}"),
                    "npz bit-identical": same,
                }
            )
        )
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    leave(exit_status(main))
