"""Compares our model with the same one whose layers are Flax's own, as in the original code.

Ours multiply two matrices in each dense layer, and in the stem.

    python benchmarks/plain_layers.py --model=s16,s32,b16,b32 --batch_size=1,8,32
    python benchmarks/plain_layers.py --model=l16,l32 --batch_size=1,8
    python benchmarks/plain_layers.py --model=nano4 --batch_size=128 --microbatches=8

Both programs live in one process and take turns, so that whatever else the machine does slows both alike. The ratio is the
time of the plain program over ours: above 1, ours is faster. Processor time is given too, since it does not grow while
another program has the cores. Takes a minute per line for large models on 2 CPU cores. Results: docs/performance.md
"""

import argparse
import statistics
import time

import jax

from mlpmixer_flax import models
from mlpmixer_flax.benchmark import named_config
from mlpmixer_flax.config import resolve
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.huge_pages import use_huge_pages
from mlpmixer_flax.training.speed import KINDS, Run, prepare

TURN_SECONDS = 1.5
PLAIN = {"_matmul": jax.lax.dot_general, "_project_patches": jax.lax.conv_general_dilated}
OURS = {name: getattr(models, name) for name in PLAIN}


def compare(name: str, kind: str, batch_size: int, *, microbatches: int, turns: int) -> str:
    """Returns a line of the table."""
    config = resolve(named_config(name), {})
    config.batch_size, config.accumulation_steps = batch_size, microbatches
    runs = {}
    for side, functions in (("plain", PLAIN), ("ours", OURS)):
        for function, layer in functions.items():
            setattr(models, function, layer)
        runs[side] = prepare(config, kind, batch_size, num_classes=1000).run
        runs[side](1)
    started = time.perf_counter()
    runs["ours"](1)
    calls = max(1, round(TURN_SECONDS / (time.perf_counter() - started)))
    ratios = []
    for turn in range(turns):
        order = ("ours", "plain") if turn % 2 else ("plain", "ours")
        times = {side: measure(runs[side], calls) for side in order}
        ratios.append([plain / own for own, plain in zip(times["ours"], times["plain"], strict=True)])
        rate = batch_size * calls / times["ours"][0]
    wall, processor = (sorted(each) for each in zip(*ratios, strict=True))
    return (
        f"{name:<7}{kind:<11}{batch_size:>5}{rate:>10,.3g}   {statistics.median(wall):.2f} "
        f"({wall[0]:.2f} to {wall[-1]:.2f}){statistics.median(processor):>12.2f}"
    )


def measure(run: Run, calls: int) -> tuple[float, float]:
    """Returns seconds, and seconds of processor time."""
    started, processor = time.perf_counter(), time.process_time()
    run(calls)
    return time.perf_counter() - started, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="s16", metavar="NAMES", help="with commas (default: %(default)s)")
    parser.add_argument("--batch_size", default="8", metavar="N,...", help="default: %(default)s")
    parser.add_argument(
        "--microbatches", type=int, default=1, metavar="N", help="in training (default: %(default)s)"
    )
    parser.add_argument("--turns", type=int, default=6, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    use_huge_pages()  # as our programs do
    print(f"{'model':<7}{'kind':<11}{'batch':>5}{'images/s':>10}   plain / ours        processor")
    for name in arguments.model.split(","):
        for kind in KINDS:
            for batch_size in map(int, arguments.batch_size.split(",")):
                print(
                    compare(
                        name, kind, batch_size, microbatches=arguments.microbatches, turns=arguments.turns
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    leave(exit_status(main))
