"""Writes a model as StableHLO: a file that JAX runs without this package, on CPU, GPU and TPU."""

from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from tqdm import tqdm

from mlpmixer_flax.atomic import replacing, write_json
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.remote import shown

PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(path: Path, model: Model, *, metadata: dict[str, Any]) -> list[str]:
    """Writes the model with its weights, serialized by jax.export, and the metadata as JSON beside it.

    The file contains one function: images uint8 (b, h, w, c), for any b, already squares of the model's size
    -> probabilities float32 (b, classes). Returns notes for the user.

    Raises:
      UserError: a file cannot be written.
    """
    beside = Path(f"{path}.json")
    size_px = model.preprocess["image_size_px"]
    shape = jax.export.symbolic_shape(f"b, {size_px}, {size_px}, {model.channels}")
    bar = tqdm(desc="exporting", total=2, delay=2, leave=False, disable=None)
    # Both are opened before the work, so that a missing permission is found, and stay as they were if one fails.
    with bar, replacing(beside) as description, replacing(path) as file:
        write_json(description, metadata)
        params = jax.device_put(model.params)
        predict = jax.jit(lambda images: model.probabilities(params, images, cropped=True))
        predict = jax.export.export(predict, platforms=PLATFORMS)
        exported = predict(jax.ShapeDtypeStruct(shape, jnp.uint8))
        bar.update()
        file.write(exported.serialize())
        bar.update()
    return [
        f"class names and preprocessing -> {shown(beside)}",
        f"takes images uint8 (b, {size_px}, {size_px}, {model.channels}), on {', '.join(PLATFORMS)}: "
        "--help shows how to use the file",
    ]
