"""Runs the training loop: from a config to the run directory of a trained model."""

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict, flatten
from mlpmixer_flax.data.class_counts import describe_classes
from mlpmixer_flax.data.examples import count_overlap
from mlpmixer_flax.dataloader import iterate
from mlpmixer_flax.rundir import accuracy_of, read_config, saved_steps, write_run
from mlpmixer_flax.training import continuing, record, sharding
from mlpmixer_flax.training.checkpoints import BestCheckpoint, Checkpoints
from mlpmixer_flax.training.evaluation import EvalStep, evaluate_classes
from mlpmixer_flax.training.intervals import Best
from mlpmixer_flax.training.lock import RunLock
from mlpmixer_flax.training.report import Recent, Reporter, read_metrics
from mlpmixer_flax.training.setup import (
    Setup,
    compile_steps,
    initial_params,
    make_setup,
    settle,
    start_state,
    to_store,
)
from mlpmixer_flax.training.signals import Interrupted, noted_signals
from mlpmixer_flax.training.step import TrainState
from mlpmixer_flax.training.table import summarize


def fit(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains a run to its end; continues from the newest checkpoint in the run directory, if it has one.

    A run continues with the same config, except for keys that change no update and the length of the run
    (`config.CHANGE_NO_UPDATE`, `config.LENGTH`), and with the same data, which may have moved.

    Args:
      config: from `load_config`, or from `get_config` and changed.
      workdir: the run directory; it is created if it does not exist.

    Returns:
      The last scores of config.test_split: "step", "test/loss", "test/accuracy" and, if there are more than five
      classes, "test/accuracy_top5"; "validation/loss" and so on if it is a validation split; {} if metrics.jsonl
      has no scores.

    Raises:
      UserError: config, data, weights or run directory cannot be used, or another process uses the directory. It
        is raised before anything is written, except for damaged images of a streamed split and damaged checkpoints.
      FloatingPointError: a metric of an update is not finite.
      Interrupted: SIGTERM or SIGINT arrived; the state is saved.
    """
    started = time.monotonic()
    workdir = continuing.usable_workdir(workdir)
    stored = read_config(workdir)
    config = settle(config, stored)
    changes = continuing.compare_configs(workdir, stored, to_store(config))
    with closing(RunLock(workdir)) as lock:
        lock.check()
        setup = make_setup(config)
        data = _check_continuing(setup, workdir, changes)
        params = None if saved_steps(workdir) else initial_params(setup)
        _describe(setup, workdir)
        if changes:
            print(continuing.describe_changes(changes), flush=True)

        lock.take()
        if read_config(workdir) != stored:
            raise UserError(
                f"another process has begun a run in {workdir} meanwhile: choose another --workdir"
            )
        write_run(workdir, to_store(config), class_names=setup.class_names, data=data)
        with closing(Checkpoints(workdir, keep=config.keep_checkpoints)) as checkpoints:
            start, state = checkpoints.restore(setup.like)
            if start:
                print(f"continuing from step {start} of {workdir}", flush=True)
            per_epoch = setup.steps_per_epoch
            if line := continuing.describe_length(stored, config, start=start, steps_per_epoch=per_epoch):
                print(line, flush=True)
            if start < setup.intervals.total_steps:
                state = start_state(setup, params) if state is None else state
                del params  # the state has a copy
                _run_updates(setup, state, start=start, checkpoints=checkpoints, workdir=workdir)
            best = checkpoints.best()
    return _finish(workdir, best, seconds=time.monotonic() - started)


def _check_continuing(setup: Setup, workdir: Path, changes: list[continuing.Change]) -> dict[str, Any]:
    """Checks classes, data and length of a run that has checkpoints; returns the record of its data."""
    data = record.make_record(setup.config, setup.train_batches.examples, setup.test_batches.examples)
    if saved_steps(workdir):  # otherwise it begins anew
        continuing.check_class_names(workdir, setup.class_names)
        moved = next((change for change in changes if change.key == "dataset"), None)
        record.check_data(workdir, record.read_record(workdir), data, moved=moved)
        continuing.check_length(workdir, setup.config, steps_per_epoch=setup.steps_per_epoch)
    return data


def _run_updates(
    setup: Setup, state: TrainState, *, start: int, checkpoints: Checkpoints, workdir: Path
) -> None:
    """Runs all updates after step `start`; logs, evaluates and saves at the intervals of the setup."""
    config, intervals = setup.config, setup.intervals
    update, score = compile_steps(setup, state)
    earlier = checkpoints.best()
    best = Best(earlier.accuracy.value if earlier else 0.0)
    reporter = Reporter(
        workdir,
        start_step=start,
        total_steps=intervals.total_steps,
        steps_per_epoch=setup.steps_per_epoch,
    )
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
            elif step == start + 1:
                reporter.first_update(step, metrics)

            scores = None
            if intervals.evaluate(step):
                with recent.paused():
                    scores, by_class = _evaluate(setup, score, state)
                reporter.evaluation(step, scores)
                reporter.class_accuracy(step, by_class, scored=setup.scored)

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
    """Returns the scores of config.test_split, and the accuracy per class by class name."""
    num_batches = len(setup.test_batches)
    batches = iterate(setup.test_batches, 0, num_batches, num_workers=setup.config.num_workers)
    bar = tqdm(batches, "evaluating", num_batches, leave=False, delay=2, disable=not sys.stdout.isatty())
    with closing(batches):
        scores, by_class = evaluate_classes(score, state.eval_params, bar, mesh=setup.mesh)
    if len(setup.class_names) <= 5:
        del scores["accuracy_top5"]  # it would always be 1
    scores = {f"{setup.scored}/{name}": value for name, value in scores.items()}
    return scores, dict(zip(setup.class_names, by_class.tolist(), strict=True))


def _describe(setup: Setup, workdir: Path) -> None:
    """Prints the model, the data and the length of the run."""
    config, like, total_steps = setup.config, setup.like, setup.intervals.total_steps
    print(summarize(setup.model, setup.input_shape, params=like.params, opt_state=like.opt_state))
    num_train, num_test = len(setup.train_batches.examples), len(setup.test_batches.examples)
    print(
        f"{config.dataset}: {num_train:,} training images, {num_test:,} {setup.scored} images, "
        f"{len(setup.class_names)} classes"
    )
    labels = (batches.examples.known_labels for batches in (setup.train_batches, setup.test_batches))
    print(describe_classes(setup.class_names, *labels, test_split=config.test_split))
    shared = count_overlap(config.dataset, config.train_split, config.test_split, data_dir=config.data_dir)
    if shared:
        print(
            f"{shared:,} images are in both train_split={config.train_split} and "
            f"test_split={config.test_split}:\n  the {setup.scored} scores say little about new images"
        )
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # from JAX_PLATFORMS
    if jax.default_backend() == "cpu" and chosen != "cpu":
        print("no GPU found, using the CPU")
    print(
        f"{total_steps:,} steps ({total_steps / setup.steps_per_epoch:.4g} epochs) of {config.batch_size} images "
        f"on {setup.mesh.size} x {jax.devices()[0].device_kind},\n  in {workdir}",
        flush=True,
    )


def _finish(workdir: Path, best: BestCheckpoint | None, *, seconds: float) -> dict[str, float]:
    """Prints the result and where it is; returns the last scores."""
    evaluations = [row for row in read_metrics(workdir / "metrics.jsonl") if accuracy_of(row)]
    last = evaluations[-1] if evaluations else {}
    elapsed = f"in {tqdm.format_interval(seconds)}"
    if accuracy := accuracy_of(last):
        print(f"done: {accuracy.scored} accuracy {accuracy.value:.2%} after {last['step']} steps, {elapsed}")
    else:
        print(f"done: {elapsed}")
    if best:
        percent = f"{best.accuracy.value:.2%}"
        print(f"best: {percent} at step {best.step}; predict, evaluate and export use this checkpoint")
    print(f"in {workdir}: checkpoints, metrics.jsonl, config, class names")
    print(f"curves: python -m mlpmixer_flax.analyze --workdir={workdir}")
    return last
