"""Write a model to one file: python -m mlpmixer_flax.export

Of a run or of other weights, in one of three formats:

  npz          weights in Google's layout, for its vision_transformer and for
               --config.init_from=
  safetensors  weights in timm's layout, for timm and for --config.init_from=;
               in timm, "tanh" GELU is act_layer=timm.layers.GELUTanh
  stablehlo    the whole model, ready to run on CPU, GPU or TPU: images in,
               probabilities out, for any number of images

With the weights go the model's sizes, GELU, image size, mean and std, and the
names of the classes; beside stablehlo they lie as OUTPUT.json.

A stablehlo file needs nothing of ours, but pip install jax flatbuffers:

  import json, jax, jax.export
  content = bytearray(open("b16.stablehlo", "rb").read())
  predict = jax.jit(jax.export.deserialize(content).call)
  class_names = json.load(open("b16.stablehlo.json", "rb"))["class_names"]
  probabilities = predict(images)  # uint8 (n, 224, 224, 3) -> float32 (n, 1000)

Images have the model's size and channels, and levels 0 to 255: mean and std are
applied inside. A photo becomes one as in evaluation by Pillow's

  photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
  ImageOps.fit(photo, (224, 224), Image.Resampling.BILINEAR, bleed=0.0625)

with image_size_px, interpolation and (1 - crop_fraction) / 2 as they stand in
OUTPUT.json, and "L" instead of "RGB" for a model of gray images, which takes
them as (n, height, width, 1).

JAX promises to load such a file in releases up to 6 months newer and 3 weeks
older than the one that wrote it (docs.jax.dev/en/latest/export/export.html).
Keep the run or an npz, which do not age, to write it anew.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from tqdm import tqdm

from mlpmixer_flax import UserError, __version__
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.terminal import exit_status
from mlpmixer_flax.trained import Trained, add_arguments, load_named, make_predict
from mlpmixer_flax.weightfiles import write_npz, write_safetensors

WRITERS = {"npz": write_npz, "safetensors": write_safetensors}  # of weights alone
FORMATS = (*WRITERS, "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")


def write_stablehlo(path: Path, trained: Trained, *, metadata: dict[str, Any]) -> list[str]:
    """Writes what jax.export serializes of the model, weights included, and beside it the metadata as JSON.

    In the file is a function: images uint8 (b, h, w, c), for any b, cropped and of the model's size already ->
    probabilities float32 (b, classes). Returns sentences to say aloud; raises UserError as `export`.
    """
    beside = Path(f"{path}.json")
    with replacing(beside) as file:  # first: whether one may write is seen at once
        file.write(json.dumps(metadata, indent=2, ensure_ascii=False).encode())
    size_px = trained.preprocess["image_size_px"]
    shape = jax.export.symbolic_shape(f"b, {size_px}, {size_px}, {trained.channels}")
    with tqdm(desc="exporting", total=2, delay=2, leave=False, disable=None) as bar:
        predict = jax.export.export(jax.jit(make_predict(trained.for_cropped_images())), platforms=PLATFORMS)
        exported = predict(jax.ShapeDtypeStruct(shape, jnp.uint8))
        bar.update()
        content = exported.serialize()
        bar.update()
    with replacing(path) as file:
        file.write(content)
    return [
        f"class names and preprocessing -> {beside}",
        f"takes images uint8 (b, {size_px}, {size_px}, {trained.channels}), on {', '.join(PLATFORMS)}: "
        "--help shows how",
    ]


def export(trained: Trained, output: Path, *, format: str) -> list[str]:
    """Writes a model or its weights to `output`; returns what a user should know of it, a sentence each.

    Args:
      format: "stablehlo" or a key of WRITERS.

    Raises:
      UserError: the file cannot be written.
    """
    metadata: dict[str, Any] = {
        "model": trained.config.get("model") or _sizes(trained.model),
        "preprocess": trained.preprocess,
        "num_classes": len(trained.class_names),
        "class_names": trained.class_names,
        "loss": trained.loss,
        "written_by": f"mlpmixer-flax {__version__}",
    }
    source = trained.name
    if trained.step is not None:
        metadata["step"] = trained.step
        source = f"step {trained.step} of {source}"
    if format == "stablehlo":
        notes = write_stablehlo(output, trained, metadata=metadata)
    else:
        notes = WRITERS[format](output, trained.params, metadata=metadata)
    if format == "safetensors" and trained.model.gelu == "tanh":
        notes.append(
            "in timm, create the model with act_layer=timm.layers.GELUTanh: these weights grew up with tanh GELU"
        )
    return [f"{source} -> {output} ({output.stat().st_size / 2**20:.1f} MiB)", *notes]


def _sizes(model: MlpMixer) -> dict[str, Any]:
    """As in a run's config."""
    keys = ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim", "gelu")
    sizes = {key: getattr(model, key) for key in keys}
    return {"patches": dict(model.patches), **sizes, "dtype": jnp.dtype(model.dtype).name}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m mlpmixer_flax.export --workdir=runs/b16 --checkpoint=best \\\n"
        "      --format=safetensors --output=b16.safetensors\n"
        "  python -m mlpmixer_flax.export --weights=imagenet1k/Mixer-B_16 \\\n"
        "      --format=stablehlo --output=b16.stablehlo",
    )
    add_arguments(parser, default="last")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write; one that is there is replaced"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.workdir and not arguments.checkpoint:
        arguments.checkpoint = "last"
    suffix = arguments.output.suffix.removeprefix(".")
    if suffix in FORMATS and suffix != arguments.format:
        raise UserError(f"--output={arguments.output} is named as another format: choose --format={suffix}")
    trained = load_named(arguments)
    notes = export(trained, arguments.output, format=arguments.format)
    if arguments.checkpoint == "last" and trained.config["ema_decay"]:
        notes.append(
            "these are not the averaged weights that the run's test accuracy is of: --checkpoint=ema are"
        )
    for note in notes:
        print(textwrap.fill(note, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    sys.exit(main())
