"""Measures how the time per image grows with the sizes of a model, the batch and the dataset; draws it.

    python benchmarks/growth.py --output=docs/growth.png

Each panel changes one size of mixer_nano4 on images of 32 px with batches of 32. The last one reads batches of 128 images of
32 px from datasets in memory, over a whole epoch, so that the shuffling is counted too. Both axes are logarithmic: the dotted
line is what grows in proportion. Takes five minutes on 2 CPU cores. Results: docs/performance.md
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mlpmixer_flax.benchmark import named_config
from mlpmixer_flax.config import resolve
from mlpmixer_flax.dataloader import TrainBatches, iterate, open_examples
from mlpmixer_flax.inference.drawing import new_figure
from mlpmixer_flax.training.speed import prepare, time_calls

BASE = {"batch_size": 32}
# What a panel changes -> a function from its size to the changed keys, and the sizes.
SIZES: dict[str, tuple[Callable[[int], dict[str, Any]], Sequence[int]]] = {
    "tokens (image size)": (lambda n: {"preprocess.image_size_px": 4 * round(n**0.5)}, (16, 64, 256, 1024)),
    "blocks": (lambda n: {"model.num_blocks": n}, (2, 4, 8, 16, 32)),
    "hidden_dim": (lambda n: {"model.hidden_dim": n, "model.channels_mlp_dim": 2 * n}, (64, 128, 256, 512)),
    "batch_size": (lambda n: {"batch_size": n}, (1, 8, 32, 128, 512)),
}
NUM_IMAGES = (1_000, 10_000, 100_000, 1_000_000)


def time_model(kind: str, changes: dict[str, Any]) -> list[float]:
    """Returns milliseconds per image of five repetitions, sorted."""
    config = resolve(named_config("nano4"), {})
    config.update_from_flattened_dict({**BASE, **changes})
    run = prepare(config, kind, config.batch_size, num_classes=10).run
    return [1e3 * t / config.batch_size for t in time_calls(run, seconds=2)]


def time_reading(num_images: int) -> list[float]:
    """Returns microseconds per image, reading a whole epoch or a million images, five times."""
    source = dataclasses.replace(open_examples("digits", "train").source, records=range(num_images))
    examples = dataclasses.replace(
        open_examples("digits", "train"),
        source=source,
        image_shape=(32, 32, 3),
        images=np.zeros((num_images, 32, 32, 3), np.uint8),
        labels=np.zeros(num_images, np.int32),
    )
    batches, times = TrainBatches(examples, batch_size=128, seed=0), []
    per_epoch = num_images // 128
    for epoch in range(5):
        started = time.perf_counter()
        for _ in iterate(batches, epoch * per_epoch, (epoch + 1) * per_epoch):
            pass
        times.append(1e6 * (time.perf_counter() - started) / (128 * per_epoch))
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="growth.png", metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    figure = new_figure(2.8)
    panels = figure.subplots(1, len(SIZES) + 1)
    for panel, (name, (changes, sizes)) in zip(panels, SIZES.items(), strict=False):
        for kind in ("training", "inference"):
            times = [time_model(kind, changes(size)) for size in sizes]
            print(f"{name}, {kind}, ms per image (lowest to highest of five):")
            draw(panel, sizes, times, label=kind)
            jax.clear_caches()
        panel.set_title(name)
    times = [time_reading(n) for n in NUM_IMAGES]
    print("training images, reading, µs per image:")
    draw(panels[-1], NUM_IMAGES, times, label="reading")
    panels[-1].set_title("training images")
    panels[0].set_ylabel("ms per image")
    panels[-1].set_ylabel("µs per image")
    panels[0].legend(fontsize="small")
    figure.savefig(arguments.output, dpi=100)
    print(f"wrote {arguments.output}")


def draw(panel: Any, sizes: Sequence[int], times: Sequence[list[float]], *, label: str) -> None:
    """Draws and prints times by size; a dotted line grows in proportion from the first point."""
    medians = [statistics.median(each) for each in times]
    for size, each, median in zip(sizes, times, medians, strict=True):
        print(f"  {size:>9,}  {median:.3g} ({each[0]:.3g} to {each[-1]:.3g})", flush=True)
    (line,) = panel.plot(sizes, medians, marker="o", label=label)
    panel.plot(sizes, [medians[0] * size / sizes[0] for size in sizes], ":", color=line.get_color())
    panel.set_xscale("log"), panel.set_yscale("log")


if __name__ == "__main__":
    main()
