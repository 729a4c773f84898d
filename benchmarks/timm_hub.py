"""Loads folders of `python -m mlpmixer_flax.export --format=hub` into timm, and compares the logits with ours.

    pip install torch==2.13.0 timm
    python benchmarks/timm_hub.py

Exports Mixers with random weights, runs the code for timm in the model card of each folder, and compares class names,
preprocessing and, in float32, logits. Then it reads the folder with `mlpmixer_flax.load`, which must give the same
weights. The exit status is 1 if logits differ by more than TOLERANCE, or anything else at all. Takes two minutes
on 2 CPU cores. Results: docs/weights.md
"""

import argparse
import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    import timm
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install torch==2.13.0 timm") from None

import mlpmixer_flax as mf
from mlpmixer_flax.config import mixer_b16_config, mixer_nano4_config, mixer_s16_config, mixer_s32_config
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.export import export
from mlpmixer_flax.inference.model import Model

# (sizes, GELU, side of the images in pixels, channels)
MODELS = [
    (mixer_s32_config, "erf", 224, 3),
    (mixer_s32_config, "tanh", 224, 3),
    (mixer_b16_config, "erf", 224, 3),
    ({**mixer_s16_config, "tokens_mlp_dim": 100, "channels_mlp_dim": 1000}, "erf", 64, 1),
    (mixer_nano4_config, "tanh", 32, 3),  # a size that timm has no name for
]
CLASS_NAMES = tuple(f"class {number}" for number in range(10))
TOLERANCE = 1e-5  # largest absolute difference of logits


def make_model(sizes: Any, gelu: str, *, size_px: int, channels: int) -> Model:
    """Returns a model with random weights, none of them 0."""
    sizes = {**sizes, "patches": {"size": tuple(sizes["patches"]["size"])}}
    module = mf.MlpMixer(num_classes=len(CLASS_NAMES), **sizes, gelu=gelu, dtype="float32")
    params = module.init(jax.random.key(0), np.zeros((1, size_px, size_px, channels), np.float32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: np.asarray(p + 0.02 * rng.normal(size=p.shape), np.float32), params)
    preprocess = {"image_size_px": size_px, "crop_fraction": 0.9, "interpolation": "bilinear", "fit": "crop"}
    preprocess |= {"mean": (0.1, 0.2, 0.3)[:channels], "std": (0.5,)}
    return Model("random", module, params, preprocess, CLASS_NAMES, "softmax", config={})


def run_card(folder: Path) -> dict[str, Any]:
    """Runs the code for timm in the model card, beside the folder; returns its variables."""
    (code,) = re.findall(r"With timm.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    variables: dict[str, Any] = {}
    with contextlib.chdir(folder.parent):
        exec(code, variables)
    return variables


def main() -> int:
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    passed = True
    print(f"timm {timm.__version__}, torch {torch.__version__}, jax {jax.__version__}")
    for sizes, gelu, size_px, channels in MODELS:
        model = make_model(sizes, gelu, size_px=size_px, channels=channels)
        images = np.random.default_rng(1).uniform(-1, 1, (8, size_px, size_px, channels)).astype(np.float32)
        ours = np.asarray(jax.jit(model.module.apply)({"params": model.params}, images))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "shared"
            export(model, folder, format="hub")
            architecture = json.loads((folder / "config.json").read_text())["architecture"]
            found = run_card(folder)
            again = mf.load(folder)
        with torch.no_grad():
            theirs = found["model"](torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        same = jax.tree.leaves(jax.tree.map(np.array_equal, again.params, dict(model.params)))
        difference = float(np.abs(ours - theirs).max())
        facts: dict[str, Any] = {
            "model": architecture,
            "gelu": gelu,
            "image": f"{size_px}x{size_px}x{channels}",
            "largest logit": round(float(np.abs(ours).max()), 3),
            "largest difference": float(f"{difference:.2g}"),
            "class names": tuple(found["class_names"]) == again.class_names == CLASS_NAMES,
            "read back": all(same) and again.module == model.module,
        }
        if "transform" in found:
            data = timm.data.resolve_model_data_config(found["model"])
            facts["preprocessing"] = (
                data["input_size"] == (channels, size_px, size_px)
                and np.allclose(data["mean"], model.preprocess["mean"])
                and np.allclose(data["std"], 0.5)
                and (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
            )
        print(json.dumps(facts), flush=True)
        passed &= difference <= TOLERANCE and all(value is not False for value in facts.values())
    return 0 if passed else 1


if __name__ == "__main__":
    leave(exit_status(main))
