"""Measures how the time per image grows with the sizes of a model, the batch and the dataset; draws it.

    python benchmarks/growth.py --output=docs/growth.png

Each panel changes one size of mixer_nano4 on images of 32 px with batches of 32; with hidden_dim, the width of the channel MLPs
changes too. The last one reads batches of 128 images of 32 px from datasets in memory, over whole epochs, so that shuffling
is counted too. Takes five minutes on 2 CPU cores. Results: docs/performance.md
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from mlpmixer_flax.benchmark import named_config
from mlpmixer_flax.config import resolve
from mlpmixer_flax.dataloader import TrainBatches, iterate, open_examples
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.drawing import new_figure
from mlpmixer_flax.training.speed import prepare, time_calls

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASE = {"batch_size": 32, "accumulation_steps": 1}
Results = dict[str, dict[str, list[list[float]]]]  # panel -> curve -> size -> times, sorted


class Panel(NamedTuple):
    """What one panel changes."""

    sizes: Sequence[int]
    power: int  # of the size, with which the time of an image may grow: the dotted line
    changes: Callable[[int], dict[str, Any]] | None = None  # of the config; None = the number of images


PANELS = {
    "tokens": Panel((16, 64, 256, 1024), 1, lambda n: {"preprocess.image_size_px": 4 * round(n**0.5)}),
    "blocks": Panel((2, 4, 8, 16, 32), 1, lambda n: {"model.num_blocks": n}),
    "hidden_dim": Panel(
        (64, 128, 256, 512), 2, lambda n: {"model.hidden_dim": n, "model.channels_mlp_dim": 2 * n}
    ),
    "images in a batch": Panel((1, 8, 32, 128, 512), 0, lambda n: {"batch_size": n}),
    "images in the dataset": Panel((1_000, 10_000, 100_000, 1_000_000), 0),
}


def time_model(kind: str, changes: dict[str, Any]) -> list[float]:
    """Returns milliseconds per image of five repetitions, sorted."""
    config = resolve(named_config("nano4"), {})
    config.update_from_flattened_dict({**BASE, **changes})
    run = prepare(config, kind, config.batch_size, num_classes=10).run
    return [1e3 * t / config.batch_size for t in time_calls(run, seconds=2)]


def time_reading(num_images: int) -> list[float]:
    """Returns microseconds per image of five epochs, sorted."""
    digits = open_examples("digits", "train")
    examples = dataclasses.replace(
        digits,
        source=dataclasses.replace(digits.source, records=range(num_images)),
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


def measure() -> Results:
    """Measures all panels and prints them."""
    results: Results = {}
    for name, panel in PANELS.items():
        for kind in ("training", "inference") if panel.changes else ("reading",):
            unit = "ms" if panel.changes else "µs"
            print(f"{name}, {kind}, {unit} per image (lowest to highest of five):")
            curve = results.setdefault(name, {}).setdefault(kind, [])
            for size in panel.sizes:
                times = time_model(kind, panel.changes(size)) if panel.changes else time_reading(size)
                curve.append(times)
                print(
                    f"  {size:>9,}  {statistics.median(times):.3g} ({times[0]:.3g} to {times[-1]:.3g})",
                    flush=True,
                )
            jax.clear_caches()
    return results


def draw(results: Results) -> "Figure":
    """Returns a panel for each size, with logarithmic axes."""
    figure = new_figure(5, "Time per image as one size grows; dotted: the growth that the design allows")
    axes = figure.subplots(2, 3).flat
    for ax, (name, panel) in zip(axes, PANELS.items(), strict=False):
        for kind, curve in results[name].items():
            medians = [statistics.median(times) for times in curve]
            (line,) = ax.loglog(panel.sizes, medians, marker="o", label=kind)
            allowed = [medians[0] * (size / panel.sizes[0]) ** panel.power for size in panel.sizes]
            ax.loglog(panel.sizes, allowed, ":", color=line.get_color())
        ax.set_xticks(panel.sizes, [str(n) if n < 1_000 else f"{n // 1_000}k" for n in panel.sizes])
        ax.minorticks_off()
        ax.set_xlabel(name)
        ax.set_ylabel("ms per image" if panel.changes else "µs per image")
        ax.set_ylim(ax.get_ylim()[0] / 2, ax.get_ylim()[1] * 5)
        ax.legend(fontsize="small", loc="upper left")
    figure.axes[-1].set_axis_off()  # there are fewer panels than places
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="growth.png", metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()
    draw(measure()).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    leave(exit_status(main))
