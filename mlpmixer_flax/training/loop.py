"""Runs the training loop: from a config to the run directory of a trained model."""

import sys
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax.config import ConfigDict, flatten
from mlpmixer_flax.dataloader import iterate
from mlpmixer_flax.rundir import (
    BEST_BY,
    check_class_names,
    check_workdir,
    read_config,
    saved_steps,
    write_run,
)
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.checkpoints import BestCheckpoint, Checkpoints
from mlpmixer_flax.training.evaluation import EvalStep, evaluate_classes
from mlpmixer_flax.training.intervals import Best
from mlpmixer_flax.training.report import Recent, Reporter, read_metrics
from mlpmixer_flax.training.setup import Setup, compile_steps, load_init_weights, make_setup, settle, to_store
from mlpmixer_flax.training.signals import Interrupted, noted_signals
from mlpmixer_flax.training.step import TrainState
from mlpmixer_flax.training.table import summarize


def fit(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains a run to its end; continues from the newest checkpoint in the run directory, if it has one.

    Args:
      config: from `load_config`, or from `get_config` and changed.
      workdir: the run directory; it is created if it does not exist.

    Returns:
      The last test scores: "step", "test/loss", "test/accuracy" and, if there are more than five classes,
      "test/accuracy_top5"; {} if metrics.jsonl has no scores.

    Raises:
      UserError: config, data, weights or run directory cannot be used. It is raised before anything is
        written, except for damaged images of a streamed split and damaged checkpoints.
      FloatingPointError: a metric of an update is not finite.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    workdir = Path(workdir)
    config = settle(config, read_config(workdir))
    check_workdir(workdir, to_store(config))
    setup = make_setup(config)
    check_class_names(workdir, setup.class_names)
    everywhere = sharding.replicated(setup.mesh)
    init = jax.jit(setup.init, out_shardings=everywhere)
    like = jax.eval_shape(init, None)
    starts_from_weights = config.init_from and not saved_steps(workdir)
    params = load_init_weights(setup, like.params) if starts_from_weights else None
    _describe(setup, like, workdir)

    write_run(workdir, to_store(config), class_names=setup.class_names)
    with closing(Checkpoints(workdir, keep=config.keep_checkpoints)) as checkpoints:
        start, state = checkpoints.restore(like, everywhere)
        if start:
            print(f"continuing from step {start} of {workdir}", flush=True)
        if start < setup.intervals.total_steps:
            state = init(params) if state is None else state
            del params  # the state has a copy
            _run_updates(setup, state, start=start, checkpoints=checkpoints, workdir=workdir)
        best = checkpoints.best()
    return _finish(workdir, best)


def _run_updates(
    setup: Setup, state: TrainState, *, start: int, checkpoints: Checkpoints, workdir: Path
) -> None:
    """Runs all updates after step `start`; logs, evaluates and saves at the intervals of the setup."""
    config, intervals = setup.config, setup.intervals
    update, score = compile_steps(setup, state)
    earlier = checkpoints.best()
    best = Best(earlier.accuracy if earlier else 0.0)
    reporter = Reporter(workdir, start_step=start, total_steps=intervals.total_steps)
    batches = iterate(setup.train_batches, start, intervals.total_steps, num_workers=config.num_workers)

    with noted_signals() as signals, closing(reporter), closing(batches):
        if start == 0:
            reporter.beginning(flatten(config), _first_images(setup))
        recent = Recent(config.batch_size)
        for step, batch in enumerate(batches, start + 1):
            state, metrics = update(state, sharding.put_batch(batch, setup.mesh))
            recent.add(step, metrics)
            reporter.advance()

            if intervals.log(step):
                reporter.training(step, recent.summary())

            scores = None
            if intervals.evaluate(step):
                with recent.paused():
                    scores, by_class = _evaluate(setup, score, state)
                reporter.evaluation(step, scores)
                reporter.class_accuracy(step, by_class)

            # Read once per step: a signal that arrives after this line stops the run after the next step.
            stopping = bool(signals)
            is_best = best.improves(scores)
            if is_best or intervals.save(step) or stopping:
                with recent.paused():
                    checkpoints.save(step, state, scores)
            if stopping and step < intervals.total_steps:
                raise Interrupted(signals[0], step)


def _first_images(setup: Setup) -> np.ndarray:
    """Returns images of the first batch as the first update sees them, uint8 (n, h, w, c)."""
    preview = jax.jit(setup.preview, out_shardings=sharding.replicated(setup.mesh))
    return jax.device_get(preview(sharding.put_batch(setup.train_batches[0], setup.mesh)))


def _evaluate(setup: Setup, score: EvalStep, state: TrainState) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the scores of the test split, and the accuracy per class by class name."""
    num_batches = len(setup.test_batches)
    batches = iterate(setup.test_batches, 0, num_batches, num_workers=setup.config.num_workers)
    bar = tqdm(batches, "evaluating", num_batches, leave=False, delay=2, disable=not sys.stdout.isatty())
    with closing(batches):
        scores, by_class = evaluate_classes(score, state.eval_params, bar, mesh=setup.mesh)
    if len(setup.class_names) <= 5:
        del scores["accuracy_top5"]  # it would always be 1
    scores = {f"test/{name}": value for name, value in scores.items()}
    return scores, dict(zip(setup.class_names, by_class.tolist(), strict=True))


def _describe(setup: Setup, like: TrainState, workdir: Path) -> None:
    """Prints the model, the data and the length of the run."""
    config = setup.config
    print(summarize(setup.model, setup.input_shape, params=like.params, opt_state=like.opt_state))
    num_train, num_test = len(setup.train_batches.examples), len(setup.test_batches.examples)
    print(
        f"{config.dataset}: {num_train:,} training images, {num_test:,} test images, "
        f"{len(setup.class_names)} classes\n"
        f"{setup.intervals.total_steps:,} steps of {config.batch_size} images "
        f"on {setup.mesh.size} x {jax.devices()[0].device_kind}, in {workdir}",
        flush=True,
    )


def _finish(workdir: Path, best: BestCheckpoint | None) -> dict[str, float]:
    """Prints the result and where it is; returns the last test scores."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if BEST_BY in row]
    last = rows[-1] if rows else {}
    print(f"done: test accuracy {last[BEST_BY]:.2%} after {last['step']} steps" if last else "done")
    if best:
        print(f"best: {best.accuracy:.2%} at step {best.step}")
    print(f"in {workdir}: checkpoints, metrics.jsonl, config, class names")
    print(f"curves: python -m mlpmixer_flax.analyze --workdir={workdir}")
    return last
