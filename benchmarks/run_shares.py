"""Measures what a run spends beside its updates: evaluations beside inference alone, and what a checkpoint costs.

    python benchmarks/run_shares.py

The models train on the included digits, which the device resizes, so that no other dataset is needed. "of inference" is
the speed of a whole evaluation over the speed of forward passes of a batch that lies on the device. "checkpoint" is what a
checkpoint adds to the time of the updates during which it is written, until everything is on disk. "share" is that time in
an epoch of the dataset for which the model is made, because the base config writes a checkpoint after each epoch. Takes three
minutes on 2 CPU cores. Results: docs/performance.md
"""

if __name__ == "__main__":
    from mlpmixer_flax import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from mlpmixer_flax.benchmark import named_config
from mlpmixer_flax.config import resolve
from mlpmixer_flax.dataloader import iterate
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.compiling import compile_steps
from mlpmixer_flax.training.evaluation import evaluate
from mlpmixer_flax.training.setup import make_setup
from mlpmixer_flax.training.speed import prepare

TURNS = 5
# model -> batch size, and training images of the dataset for which it is made
MODELS = {"digits": (64, 1_433), "mnist": (128, 60_000), "nano4": (128, 50_000)}


@dataclass
class Shares:
    """What was measured in each turn."""

    evaluation: list[float]  # speed of a whole evaluation / speed of inference
    save_seconds: list[float]  # that a checkpoint adds
    epoch_seconds: list[float]  # of updates without a checkpoint


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(name: str, workdir: Path) -> Shares:
    batch_size, num_images = MODELS[name]
    config = resolve(named_config(name), {})
    config.batch_size = batch_size
    setup = make_setup(config)
    steps = compile_steps(setup, None, params=None)
    state, n = steps.state, len(setup.test_batches)
    (update_step,), (score_step,) = steps.updates.values(), steps.eval_steps.values()  # of one size
    batch = sharding.put_batch(setup.train_batches[0], setup.mesh)
    infer = prepare(config, "inference", batch_size, num_classes=len(setup.class_names)).run

    def score() -> None:
        batches = iterate(setup.test_batches, 0, n)
        evaluate(score_step, state.eval_params, batches, mesh=setup.mesh)

    def update(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, _ = update_step(state, batch)
        jax.block_until_ready(state)

    update(1), score(), infer(1)
    count = max(
        1, round(2 / seconds(lambda: update(1)))
    )  # two seconds are longer than a checkpoint takes here
    shares, checkpoints = Shares([], [], []), Checkpoints(workdir, keep=1)

    def update_and_save(step: int) -> None:
        checkpoints.save(step, state, None)
        update(count)
        checkpoints.best()  # waits until everything is on disk

    for turn in range(TURNS + 1):
        of_inference = seconds(lambda: infer(n)) / seconds(score)
        alone = seconds(lambda: update(count))
        together = seconds(lambda turn=turn: update_and_save(turn + 1))
        if turn:  # the first one warms up
            shares.evaluation.append(of_inference)
            shares.save_seconds.append(together - alone)
            shares.epoch_seconds.append(alone / count * num_images / batch_size)
    checkpoints.close()
    return shares


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{'model':<8}{'of inference':<24}{'checkpoint, s':<24}share of an epoch of updates")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(sys.stderr):  # what a run says at its start
                shares = measure(name, Path(folder))
        share = statistics.median(shares.save_seconds) / statistics.median(shares.epoch_seconds)
        print(
            f"{name:<8}{spread(shares.evaluation, 2):<24}{spread(shares.save_seconds, 2):<24}"
            f"{share:.1%} of {statistics.median(shares.epoch_seconds):,.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    leave(exit_status(main))
