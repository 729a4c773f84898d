"""Write a model to a file: python -m mlpmixer_flax.export

The model is that of a run or of other weights. The format is one of:

  npz          weights in Google's layout, for its vision_transformer code and
               for --config.init_from=
  safetensors  weights in timm's layout, for timm and for --config.init_from=;
               if they were trained with tanh GELU, create timm's model with
               act_layer=timm.layers.GELUTanh
  stablehlo    the whole model, ready to run on CPU, GPU or TPU: images in,
               probabilities out, for any number of images

The file also contains the model's sizes, GELU, image size, mean, std and class
names; for stablehlo they are in a second file, OUTPUT.json.

A stablehlo file runs without this package, after pip install jax flatbuffers:

  import json, jax, jax.export
  content = bytearray(open("b16.stablehlo", "rb").read())
  predict = jax.jit(jax.export.deserialize(content).call)
  class_names = json.load(open("b16.stablehlo.json", "rb"))["class_names"]
  probabilities = predict(images)  # uint8 (n, 224, 224, 3) -> float32 (n, 1000)

Images must have the model's size and channels, and values from 0 to 255; the
function applies mean and std. Pillow prepares a photo as in evaluation:

  photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
  photo = ImageOps.fit(photo, (224, 224), Image.BILINEAR, bleed=0.0625)
  images = numpy.asarray(photo)[None]

"preprocess" in OUTPUT.json has image_size_px instead of 224, interpolation
instead of BILINEAR, and crop_fraction: bleed is (1 - crop_fraction) / 2. A
model of gray images takes shape (n, height, width, 1) and needs "L" instead of
"RGB".

JAX guarantees that releases up to 6 months newer and 3 weeks older than the one
that wrote the file can load it (docs.jax.dev/en/latest/export/export.html).
Keep the run or an npz file, which do not age, so that you can export again.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from tqdm import tqdm

from mlpmixer_flax import UserError, __version__
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.cli import add_model, exit_status, leave, load_model, make_parser, path
from mlpmixer_flax.data.files import check_no_url
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.remote import copy_of, publish, shown
from mlpmixer_flax.text import printable, wrap
from mlpmixer_flax.weights.files import write_npz, write_safetensors

WRITERS = {"npz": write_npz, "safetensors": write_safetensors}  # the formats that hold weights only
FORMATS = (*WRITERS, "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(path: Path, model: Model, *, metadata: dict[str, Any]) -> list[str]:
    """Writes the model with its weights, serialized by jax.export, and the metadata as JSON beside it.

    The file contains one function: images uint8 (b, h, w, c), for any b, already cropped to the model's size
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
        text = json.dumps(metadata, indent=2, ensure_ascii=False)
        description.write(text.encode(errors="backslashreplace"))  # names may have bytes that are not text
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


def export(model: Model, output: str | os.PathLike[str], *, format: str) -> list[str]:
    """Writes a model or its weights to a file, and creates the folder of the file; returns notes for the user.

    Args:
      output: the file; an existing one is replaced.
      format: "stablehlo" or a key of WRITERS.

    Raises:
      UserError: the format is unknown, or the file cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown: choose one of {', '.join(FORMATS)}")
    if copy := copy_of(output):
        output = copy
    check_no_url(os.fspath(output), name="output")
    output = Path(os.path.expanduser(output))
    make_folder(output.parent)
    metadata: dict[str, Any] = {
        "model": model.config.get("model") or _sizes(model.module),
        "preprocess": model.preprocess,
        "num_classes": len(model.class_names),
        "class_names": model.class_names,
        "loss": model.loss,
        "written_by": f"mlpmixer-flax {__version__}",
    }
    name = model.name
    if model.step is not None:
        metadata["step"] = model.step
        name = f"step {model.step} of {name}"
    if format == "stablehlo":
        notes = write_stablehlo(output, model, metadata=metadata)
    else:
        notes = WRITERS[format](output, model.params, metadata=metadata)
    publish(*[file for file in (output, Path(f"{output}.json")) if file.exists()])
    if format == "safetensors" and model.module.gelu == "tanh":
        notes.append(
            "in timm, create the model with act_layer=timm.layers.GELUTanh, because the weights were trained with "
            "tanh GELU"
        )
    return [f"{name} -> {shown(output)} ({output.stat().st_size / 2**20:.1f} MiB)", *notes]


def _sizes(module: MlpMixer) -> dict[str, Any]:
    """Returns the sizes and options of a module, as `config.model` of a run has them."""
    keys = ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim", "gelu")
    sizes = {key: getattr(module, key) for key in keys}
    return {"patches": dict(module.patches), **sizes, "dtype": jnp.dtype(module.dtype).name}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "export",
        __doc__,
        examples="  python -m mlpmixer_flax.export --workdir=runs/b16 \\\n"
        "      --format=safetensors --output=b16.safetensors\n"
        "  python -m mlpmixer_flax.export --weights=imagenet1k/Mixer-B_16 \\\n"
        "      --format=stablehlo --output=b16.stablehlo",
    )
    add_model(parser)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--output",
        type=path,
        required=True,
        metavar="FILE",
        help="file to write; its folder is created, and an existing file is replaced",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    suffix = arguments.output.suffix.removeprefix(".")
    if suffix in FORMATS and suffix != arguments.format:
        raise UserError(
            f"--output={arguments.output} does not fit --format={arguments.format}: give --format={suffix}, or a name "
            f"that ends in .{arguments.format}"
        )
    model = load_model(arguments)
    notes = export(model, arguments.output, format=arguments.format)
    if arguments.checkpoint == "last" and model.config["ema_decay"]:
        notes.append(
            "these are not the weights that the run evaluated (its EMA): --checkpoint=ema exports the EMA"
        )
    for note in notes:
        print(wrap(printable(note)))


if __name__ == "__main__":
    leave(main())
