"""Write the weights of a run to one file: python -m mlpmixer_flax.export --workdir=runs/b16 --format=npz --output=b16.npz

  npz           Google's layout: read by google-research/vision_transformer and by --config.init_from=
  safetensors   timm's layout: read by timm (create the model with act_layer=timm.layers.GELUTanh where the run's GELU is
                "tanh") and by --config.init_from=

With the weights go the model's sizes, GELU, image size, mean and std, and the names of the classes.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from mlpmixer_flax import UserError, __version__
from mlpmixer_flax.checkpoint import read_class_names, read_config, read_weights
from mlpmixer_flax.weightfiles import write_npz, write_safetensors

WRITERS = {"npz": write_npz, "safetensors": write_safetensors}


def export(workdir: Path, output: Path, *, format: str, weights: str = "last") -> list[str]:
    """Writes the weights of a run to `output`; returns what a user should know of it, a sentence each.

    Args:
      format: a key of WRITERS.
      weights: "last", "best" or "ema", as in `checkpoint.read_weights`.

    Raises:
      UserError: there is no such run or checkpoint, or the file cannot be written.
    """
    config = read_config(workdir)
    if not config:
        raise UserError(f"no run in {workdir}: it has no config.json; --workdir is the directory of a run")
    step, params = read_weights(workdir, weights)
    class_names = read_class_names(workdir)
    metadata: dict[str, Any] = {
        "model": config["model"],
        "preprocess": config["preprocess"],
        "num_classes": len(class_names),
        "class_names": class_names,
        "step": step,
        "written_by": f"mlpmixer-flax {__version__}",
    }
    notes = WRITERS[format](output, params, metadata=metadata)
    if weights == "last" and config["ema_decay"]:
        notes.append(
            "these are not the averaged weights that the run's test accuracy is of: --weights=ema are"
        )
    if format == "safetensors" and config["model"]["gelu"] == "tanh":
        notes.append(
            "in timm, create the model with act_layer=timm.layers.GELUTanh: these weights grew up with tanh GELU"
        )
    return [f"step {step} of {workdir} -> {output} ({output.stat().st_size / 2**20:.1f} MiB)", *notes]


def main(argv: list[str] | None = None) -> int:
    """The program. Exit status: 0 done, 2 unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory of the run")
    parser.add_argument("--format", choices=WRITERS, required=True)
    parser.add_argument(
        "--output", type=Path, required=True, help="file to write; one that is there is replaced"
    )
    parser.add_argument(
        "--weights",
        choices=("last", "best", "ema"),
        default="last",
        help="which of the run's (default: last)",
    )
    arguments = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant to be
    try:
        notes = export(
            arguments.workdir, arguments.output, format=arguments.format, weights=arguments.weights
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
