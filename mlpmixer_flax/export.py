"""Write a model to a file: python -m mlpmixer_flax.export

The model is that of a run or of other weights. The format is one of:

  npz          weights in Google's layout, for its vision_transformer code and
               for --config.init_from=
  safetensors  weights in timm's layout, for timm and for --config.init_from=;
               if they were trained with tanh GELU, create timm's model with
               act_layer=timm.layers.GELUTanh
  hub          a folder to share: weights, their config.json, and a model card.
               timm reads it unchanged; --push=OWNER/NAME uploads it to the
               Hugging Face hub
  onnx         the whole model, for ONNX Runtime, OpenVINO or a web browser:
               images in, probabilities out, for any number of images
  stablehlo    the whole model, ready to run on CPU, GPU or TPU: images in,
               probabilities out, for any number of images

The file also contains the model's sizes, GELU, image size, mean, std and class
names; for stablehlo and onnx they are in a second file, OUTPUT.json.

An onnx file runs after pip install onnxruntime:

  import onnxruntime
  session = onnxruntime.InferenceSession("b16.onnx")
  (probabilities,) = session.run(None, {"images": images})

A stablehlo file runs without this package, after pip install jax flatbuffers:

  import json, jax, jax.export
  content = bytearray(open("b16.stablehlo", "rb").read())
  predict = jax.jit(jax.export.deserialize(content).call)
  class_names = json.load(open("b16.stablehlo.json", "rb"))["class_names"]
  probabilities = predict(images)  # uint8 (n, 224, 224, 3) -> float32 (n, 1000)

Images must have the model's size and channels, and values from 0 to 255; the
function applies mean and std. "preprocess" in OUTPUT.json says how to prepare a
photo as in evaluation, with Pillow; if it is transparent, paste it on white
first. Three lines do it if "fit" is "crop":

  photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
  photo = ImageOps.fit(photo, (224, 224), Image.BILINEAR, bleed=0.0625)
  images = numpy.asarray(photo)[None]

If "fit" is "stretch", these replace the second line:

  bleed, (w, h) = 0.0625, photo.size
  box = bleed * w, bleed * h, (1 - bleed) * w, (1 - bleed) * h
  photo = photo.resize((224, 224), Image.BILINEAR, box)

If "fit" is "pad", these replace the second line:

  bleed, (w, h) = 0.0625, photo.size
  box = bleed * w, bleed * h, (1 - bleed) * w, (1 - bleed) * h
  w, h = [max(1, round(224 * side / max(w, h))) for side in (w, h)]
  part = photo.resize((w, h), Image.BILINEAR, box)
  photo = Image.new("RGB", (224, 224), "gray")
  photo.paste(part, ((224 - w) // 2, (224 - h) // 2))

"preprocess" also has image_size_px instead of 224, interpolation instead of
BILINEAR, and crop_fraction: bleed is (1 - crop_fraction) / 2. A model of gray
images takes shape (n, height, width, 1) and needs "L" instead of "RGB".

JAX guarantees that releases up to 6 months newer and 3 weeks older than the one
that wrote the file can load it (docs.jax.dev/en/latest/export/export.html).
Keep the run or an npz file, which do not age, so that you can export again.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mlpmixer_flax import UserError, __version__
from mlpmixer_flax.atomic import make_folder
from mlpmixer_flax.cli import add_model, load_model, make_parser, path
from mlpmixer_flax.data.files import check_no_url
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.hub_folder import TANH_IN_TIMM, check_not_a_run, write_hub
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.onnx_file import write_onnx
from mlpmixer_flax.inference.stablehlo import write_stablehlo
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.remote import copy_of, publish, shown
from mlpmixer_flax.text import printable, wrap
from mlpmixer_flax.weights import hub
from mlpmixer_flax.weights.files import write_npz, write_safetensors


def _write_npz(path: Path, model: Model, *, metadata: dict[str, Any]) -> list[str]:
    return write_npz(path, model.params, metadata=metadata)


def _write_safetensors(path: Path, model: Model, *, metadata: dict[str, Any]) -> list[str]:
    notes = write_safetensors(path, model.params, metadata=metadata)
    return [*notes, TANH_IN_TIMM] if model.module.gelu == "tanh" else notes


# Format -> function that writes a model to a path and returns sentences for the user
FORMATS: dict[str, Callable[..., list[str]]] = {
    "npz": _write_npz,
    "safetensors": _write_safetensors,
    "stablehlo": write_stablehlo,
    "onnx": write_onnx,
    "hub": write_hub,
}


def export(model: Model, output: str | os.PathLike[str], *, format: str, hub_name: str = "") -> list[str]:
    """Writes a model or its weights to a file or folder, and creates the folder of it; returns notes for the user.

    Args:
      output: the file, or for "hub" the folder; existing files are replaced.
      format: a key of FORMATS.
      hub_name: for "hub", the OWNER/NAME to which the folder is uploaded; "" = it is not.

    Raises:
      UserError: the format is unknown, a file cannot be written, or the hub does not take it.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown: choose one of {', '.join(FORMATS)}")
    if hub_name and format != "hub":
        raise UserError(f"format={format} cannot be uploaded to {hub_name}: choose format=hub")
    if copy := copy_of(output):
        output = copy
    check_no_url(os.fspath(output), name="output")
    output = Path(os.path.expanduser(output))
    write = FORMATS[format]
    if hub_name:
        hub.check_name(hub_name)
        check_not_a_run(output)  # before the hub has a new model, which would stay empty
        hub.create(hub_name)
        write = partial(write, hub_name=hub_name)
    make_folder(output.parent)
    metadata: dict[str, Any] = {
        "model": model.config.get("model") or _sizes(model.module),
        "preprocess": model.preprocess,
        "num_classes": len(model.class_names),
        "class_names": model.class_names,
        "loss": model.loss,
        "written_by": f"mlpmixer-flax {__version__}",
    }
    if model.resolutions_px:
        metadata["resolutions_px"] = model.resolutions_px
    name = model.name
    if model.step is not None:
        metadata["step"] = model.step
        name = f"step {model.step} of {name}"
    notes = write(output, model, metadata=metadata)
    publish(*[file for file in (output, Path(f"{output}.json")) if file.exists()])
    if hub_name:
        notes += hub.push(output, hub_name)
    size = sum(file.stat().st_size for file in [output, *output.glob("*")] if file.is_file())
    return [f"{name} -> {shown(output)} ({size / 2**20:.1f} MiB)", *notes]


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
        "      --format=stablehlo --output=b16.stablehlo\n"
        "  python -m mlpmixer_flax.export --workdir=runs/b16 \\\n"
        "      --format=hub --output=shared/b16 --push=OWNER/NAME",
    )
    add_model(parser)
    parser.add_argument(
        "--format", choices=FORMATS, required=True, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--output",
        type=path,
        required=True,
        metavar="FILE",
        help="file (for hub: folder) to write; its folder is created, and existing files are replaced",
    )
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="with --format=hub: also upload the files to this model on the Hugging Face hub; a new one is public",
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
    if arguments.push:
        if arguments.format != "hub":
            raise UserError(f"--push={arguments.push} is for --format=hub only: give that, or leave it out")
        hub.check_name(arguments.push)  # before weights are read
    model = load_model(arguments)
    notes = export(model, arguments.output, format=arguments.format, hub_name=arguments.push)
    if arguments.checkpoint == "last" and model.config["ema_decay"]:
        notes.append(
            "these are not the weights that the run evaluated (its EMA): --checkpoint=ema exports the EMA"
        )
    for note in notes:
        print(wrap(printable(note)))


if __name__ == "__main__":
    leave(main())
