"""Measure speed and memory: python -m mlpmixer_flax.benchmark --model=b16

Runs training and inference on images made of random numbers, which need no
dataset, and prints one line per model, kind and batch size:

  images/s  median of five repetitions, over all devices
  spread    difference of the slowest and the fastest repetition to the median
  TFLOP/s   useful operations only: 2 per multiply-accumulate of a forward pass,
            and three times as many for an update
  share     of the rate that a large matrix product reaches in this process,
            with the same data type
  MiB       memory that the compiler plans for the program on one device
  compile   seconds, which are not part of the speed; nothing is taken from the
            folder of compiled programs

With --config, an update has the augmentation, the optimizer and all else of the
config. With resolutions_px, only images of its own size, image_size_px, are
measured, and class_weights are left out. A config with distill_from is refused.
With --model, an update has no augmentation, and AdamW.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flax
import jax

import mlpmixer_flax.config as sizes
from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.cli import make_parser, path
from mlpmixer_flax.compilation_cache import compiled_anew
from mlpmixer_flax.config import ConfigDict, get_config, resolve
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.limits import check_positive, show
from mlpmixer_flax.remote import publish
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.speed import (
    HEADER,
    KINDS,
    Row,
    check_measurable,
    check_seconds,
    format_row,
    measure,
    measure_product,
)

# name -> (architecture, side of the images in pixels)
MODELS = {
    "s8": (sizes.mixer_s8_config, 224),
    "s16": (sizes.mixer_s16_config, 224),
    "s32": (sizes.mixer_s32_config, 224),
    "b16": (sizes.mixer_b16_config, 224),
    "b32": (sizes.mixer_b32_config, 224),
    "l16": (sizes.mixer_l16_config, 224),
    "l32": (sizes.mixer_l32_config, 224),
    "h14": (sizes.mixer_h14_config, 224),
    "digits": (sizes.mixer_digits_config, 8),
    "mnist": (sizes.mixer_mnist_config, 28),
    "nano4": (sizes.mixer_nano4_config, 32),
    "tiny4": (sizes.mixer_tiny4_config, 32),
    "folder": (sizes.mixer_folder_config, 64),
}


def environment() -> dict[str, Any]:
    """Returns what the figures depend on: devices and versions."""
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def named_config(name: str) -> ConfigDict:
    """Returns a config for a model of MODELS, without augmentation.

    Raises:
      UserError: there is no such model.
    """
    if name not in MODELS:
        raise UserError(f"there is no model {name!r}: choose one of {', '.join(MODELS)}")
    architecture, size_px = MODELS[name]
    config = get_config()
    config.model.update(architecture)
    config.preprocess.image_size_px = size_px
    config.optimizer.weight_decay = 0.1
    on_cpu = jax.default_backend() == "cpu"
    config.model.dtype = "float32" if on_cpu else "bfloat16"
    config.batch_size = 8 if on_cpu else 128
    return config


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "benchmark",
        __doc__,
        examples="  python -m mlpmixer_flax.benchmark --model=s16,b16 --batch_size=8,32\n"
        "  python -m mlpmixer_flax.benchmark --config=configs/b16_cifar10.py \\\n"
        "      --config.model.dtype=bfloat16 --batch_size=128 --json=b16.json\n"
        f"models: {' '.join(MODELS)}",
    )
    named = parser.add_mutually_exclusive_group(required=True)
    named.add_argument("--config", metavar="FILE", help="config file; --config.KEY=VALUE changes a key of it")
    named.add_argument(
        "--model", type=_words, metavar="NAMES", help="models, with commas between their names"
    )
    parser.add_argument(
        "--batch_size",
        type=_numbers,
        metavar="N,...",
        help="images per update, over all devices (default: of the config; with --model 8 on a CPU, else 128)",
    )
    parser.add_argument("--kind", choices=KINDS, help="measure only this kind (default: both)")
    parser.add_argument(
        "--num_classes",
        type=int,
        default=1000,
        metavar="N",
        help="classes of the head (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="time per line (default: %(default)s)"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write all figures to this file")
    arguments, arguments.overrides = parser.parse_known_args(argv)
    return arguments


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 8,32") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


@compiled_anew()
def _run(arguments: argparse.Namespace) -> None:
    configs = _configs(arguments)
    facts, rows, products = environment(), [], {}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for name, config in configs.items():
        dtype = config.model.dtype
        if dtype not in products:
            products[dtype] = measure_product(dtype, seconds=arguments.seconds)
            print(f"a matrix product in {dtype} reaches {products[dtype]:.3g} TFLOP/s per device", flush=True)
        if not rows:
            print(HEADER)
        for kind in _kinds(arguments):
            for batch_size in arguments.batch_size or [config.batch_size]:
                row = measure(
                    name,
                    config,
                    kind,
                    batch_size,
                    num_classes=arguments.num_classes,
                    product_tflops=products[dtype],
                    seconds=arguments.seconds,
                )
                print(format_row(row), flush=True)
                rows.append(row)
                if arguments.json:  # after each row, because the next one may take too long
                    write_figures(arguments.json, {**facts, "product_tflops": products}, rows)


def write_figures(file: Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes facts about the machine, and the rows of a table, as JSON."""
    make_folder(file.parent)
    with replacing(file) as opened:
        opened.write(f"{json.dumps({**facts, 'rows': [asdict(row) for row in rows]}, indent=1)}\n".encode())
    publish(file)


def _configs(arguments: argparse.Namespace) -> dict[str, ConfigDict]:
    """Returns the configs to measure by the name of their lines, after a check of all options."""
    if arguments.config:
        name = arguments.config.removesuffix(".py").rpartition("/")[2]
        configs = {name: resolve(load_config(arguments.config, arguments.overrides), {})}
        if teacher := configs[name].distill_from:
            raise UserError(
                f"distill_from={show(teacher, 120)}: updates with a teacher are not measured, so add --config.distill_from="
            )
    elif arguments.overrides:
        raise UserError(f"{' '.join(arguments.overrides)} has no meaning without --config: remove it")
    else:
        configs = {name: resolve(named_config(name), {}) for name in arguments.model}
    check_positive(num_classes=arguments.num_classes)
    check_seconds(arguments.seconds)
    for config in configs.values():
        for kind in _kinds(arguments):
            for batch_size in arguments.batch_size or [config.batch_size]:
                check_measurable(config, kind, batch_size)
    return configs


def _kinds(arguments: argparse.Namespace) -> Sequence[str]:
    return [arguments.kind] if arguments.kind else KINDS


if __name__ == "__main__":
    leave(main())
