"""Measures how fast batches are read: from memory, and from JPEGs beside what Pillow alone needs for the same work.

    python benchmarks/input_rates.py

First, 10,000 images of 32 px in memory, on one core. Then 2,000 JPEGs of about 400x300 px on all cores, decoded, cropped at
random and resized to 224 px, in turns with plain calls of Pillow in as many threads. The time to start threads or worker
processes is not counted. The JPEGs are made here, with as much detail at each scale as photographs have on average. Takes
two minutes. Results: docs/performance.md
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mlpmixer_flax.dataloader import TrainBatches, iterate, open_examples
from mlpmixer_flax.ending import exit_status, leave

NUM_SMALL, SMALL_PX, NUM_LARGE, LARGE_PX = 10_000, 32, 2_000, 224
BATCH_SIZE, TURNS = 100, 7


def make_photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns an image of noise whose amplitudes fall with the frequency, as in photographs."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitudes = 1 / np.maximum(np.hypot(rows, columns), 1 / width)
    noise = np.fft.rfft2(rng.normal(size=(3, height, width)))
    pixels = np.fft.irfft2(noise * amplitudes, s=(height, width))
    gray, colours = pixels[:1] / pixels[:1].std(), pixels / pixels.std()
    return Image.fromarray((128 + 40 * (gray + colours / 3)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def rate(read: Callable[[], int]) -> float:
    """Returns images per second of a function that returns how many it read."""
    started = time.perf_counter()
    return read() / (time.perf_counter() - started)


def measure_memory(folder: Path) -> list[float]:
    rng = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
    for i in range(NUM_SMALL):
        pixels = rng.integers(0, 256, (SMALL_PX, SMALL_PX, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png", compress_level=0)
    batches = TrainBatches(
        open_examples(f"folder:{folder}", "train", image_size_px=SMALL_PX), batch_size=128, seed=0
    )

    def read() -> int:
        return sum(len(batch["label"]) for batch in iterate(batches, 0, 1_000))

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rates = [rate(read) for _ in range(TURNS)]
    os.sched_setaffinity(0, cores)
    return rates


def measure_jpegs(folder: Path, workers: list[int]) -> dict[str, list[float]]:
    """Returns the rates of each turn: of Pillow alone, and of ours by the number of worker processes."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
    for i in range(NUM_LARGE):
        width, height = rng.integers((360, 270), (440, 330))
        make_photo(rng, width, height).save(folder / "ab"[i % 2] / f"{i}.jpg", quality=90)
    files = sorted(folder.glob("*/*.jpg"))
    size = sum(file.stat().st_size for file in files) / len(files)
    print(f"{len(files):,} JPEGs of {size / 1024:.0f} KiB on average", flush=True)
    examples = open_examples(f"folder:{folder}", "train", image_size_px=LARGE_PX, min_crop_area=0.25)
    batches = TrainBatches(examples, batch_size=BATCH_SIZE, seed=0)
    boxes = {file: rng.uniform(0, 0.4, 2) for file in files}

    def open_one(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            left, top = boxes[file] * image.size
            side = 0.6 * min(image.size)
            box = (left, top, min(left + side, image.width), min(top + side, image.height))
            return np.asarray(image.resize((LARGE_PX, LARGE_PX), Image.Resampling.BILINEAR, box))

    def pillow() -> int:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return sum(image.shape == (LARGE_PX, LARGE_PX, 3) for image in pool.map(open_one, files))

    def ours(num_workers: int) -> float:
        stream = iterate(batches, 0, NUM_LARGE // BATCH_SIZE, num_workers=num_workers)
        next(stream)  # the first batch starts the threads or processes
        return rate(lambda: sum(len(batch["label"]) for batch in stream))

    rates: dict[str, list[float]] = {}
    for _ in range(TURNS):
        rates.setdefault("Pillow alone", []).append(rate(pillow))
        for n in workers:
            rates.setdefault(f"ours, num_workers={n}", []).append(ours(n))
    return rates


def main() -> None:
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLPMIXER_CACHE"] = f"{folder}/cache"  # gets a list of the images that were checked
        rates = measure_memory(Path(folder, "small"))
        print(
            f"in memory, {SMALL_PX} px, one core: {statistics.median(rates):,.0f} images/s "
            f"({min(rates):,.0f} to {max(rates):,.0f})",
            flush=True,
        )
        jpegs = measure_jpegs(Path(folder, "large"), [0, 2])
    for name, speeds in jpegs.items():
        shares = sorted(a / b for a, b in zip(speeds, jpegs["Pillow alone"], strict=True))
        print(
            f"{name}: {statistics.median(speeds):,.0f} images/s, "
            f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f}) of Pillow alone"
        )


if __name__ == "__main__":
    leave(exit_status(main))
