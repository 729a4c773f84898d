"""Runs the training loop: from a config to the run directory of a trained model."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax.config import ConfigDict, flatten
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, iterate
from mlpmixer_flax.remote import shown
from mlpmixer_flax.run_weights import score_of, sized
from mlpmixer_flax.text import printable
from mlpmixer_flax.training import continuing, launch, sharding
from mlpmixer_flax.training.advice import advising
from mlpmixer_flax.training.begin import agree_on_workdir, begin
from mlpmixer_flax.training.checkpoints import BestCheckpoint, Checkpoints
from mlpmixer_flax.training.compiling import Steps, compile_steps
from mlpmixer_flax.training.evaluation import EvalStep, class_scores, evaluate_sizes
from mlpmixer_flax.training.intervals import Best, Intervals, evals_since_best
from mlpmixer_flax.training.lock import RunLock
from mlpmixer_flax.training.mirror import mirrored
from mlpmixer_flax.training.multi_label import label_scores
from mlpmixer_flax.training.processes import Interrupted, ending_all, from_lead, is_lead, together
from mlpmixer_flax.training.report import Recent, Reporter, read_metrics
from mlpmixer_flax.training.resolutions import size_of_update
from mlpmixer_flax.training.setup import Setup
from mlpmixer_flax.training.signals import noted_signals, signal_row
from mlpmixer_flax.training.step import PreviewStep, TrainState
from mlpmixer_flax.training.tracker import Tracker
from mlpmixer_flax.training.unlogged import Unlogged
from mlpmixer_flax.training.validate import read_stored

# Receives the scores of an evaluation, by their names in metrics.jsonl, with "step"
OnEvaluation = Callable[[dict[str, float]], object]


def fit(
    config: ConfigDict,
    workdir: str | Path,
    *,
    distributed: str = "auto",
    on_evaluation: OnEvaluation | None = None,
) -> dict[str, float]:
    """Trains a run to its end; continues from the newest checkpoint in the run directory, if it has one.

    A run continues with the same config, except for keys that change no update and the length of the run
    (`config.CHANGE_NO_UPDATE`, `config.LENGTH`), and with the same data, which may have moved.

    Args:
      config: from `load_config`, or from `get_config` and changed.
      workdir: the run directory, which may be remote; it is created if it does not exist. In a run with several processes, the first
        one decides.
      distributed: how to find the other processes of the run, see `launch.start`. If one of them fails after the
        start, all end.
      on_evaluation: is called in every process after each evaluation of this call. If it raises an exception, the run
        ends with it, and can continue from its newest checkpoint.

    Returns:
      The last row of metrics.jsonl that has scores of config.test_split: "step", "test/loss", "test/accuracy" and the
      others that `class_scores` or `label_scores` compute, "validation/loss" and so on if it is a validation split; {}
      if there is none.

    Raises:
      UserError: config, data, weights or run directory cannot be used, or another process uses the directory. It
        is raised before anything is written, except for damaged images of a streamed split and damaged checkpoints.
      FloatingPointError: a metric of an update is not finite.
      OSError, MemoryError, jax.errors.JaxRuntimeError: the environment is at fault: memory, disk or driver. Notes of
        the exception say what is saved.
      Interrupted: SIGTERM, SIGINT or SIGHUP arrived; the state is saved.
    """
    started = time.monotonic()
    launch.start(distributed)
    with together(), mirrored(workdir) as workdir:
        workdir = agree_on_workdir(workdir)
        with advising(workdir), closing(RunLock(workdir)) as lock:
            stored = from_lead(lambda: read_stored(workdir))
            setup, params = begin(config, workdir, stored=stored, lock=lock)
            keep, best_by = setup.config.keep_checkpoints, setup.config.best_by
            checkpoints = Checkpoints(workdir, keep=keep, best_by=best_by)
            with closing(checkpoints), ending_all(), advising(workdir):
                start, state = checkpoints.restore(setup.like)
                if start:
                    print(f"continuing from step {start} of {shown(workdir)}", flush=True)
                per_epoch = setup.steps_per_epoch
                lacks_scores = _lacks_scores(setup.intervals, workdir, start)
                finished = not lacks_scores and (
                    start >= setup.intervals.total_steps or _stops_early(setup.config, workdir, start)
                )
                if not finished:
                    line = continuing.describe_length(
                        stored, setup.config, start=start, steps_per_epoch=per_epoch
                    )
                    if line:
                        print(line, flush=True)
                    steps = compile_steps(setup, state, params=params)
                    del params  # the state has a copy
                    _run_updates(
                        setup,
                        steps,
                        start=start,
                        lacks_scores=lacks_scores,
                        checkpoints=checkpoints,
                        workdir=workdir,
                        on_evaluation=on_evaluation,
                    )
                best = checkpoints.best()
        return from_lead(lambda: _finish(workdir, best, best_by=best_by, seconds=time.monotonic() - started))


def _run_updates(
    setup: Setup,
    steps: Steps,
    *,
    start: int,
    lacks_scores: bool,
    checkpoints: Checkpoints,
    workdir: Path,
    on_evaluation: OnEvaluation | None,
) -> None:
    """Runs all updates after step `start`; logs, evaluates and saves at the intervals of the setup.

    With `lacks_scores`, it evaluates the state of step `start` first.
    """
    config, intervals, several = setup.config, setup.intervals, jax.process_count() > 1
    state = steps.state
    earlier = checkpoints.best()
    best = Best(earlier and earlier.score, best_by=config.best_by)
    reporter = Reporter(
        workdir,
        start_step=start,
        total_steps=intervals.total_steps,
        steps_per_epoch=setup.steps_per_epoch,
        tracker=_start_tracker(config, workdir) if config.tracker else None,
    )
    skipped = _skipped(setup, "train", setup.train_batches)
    batches = iterate(setup.train_batches, start, intervals.total_steps, num_workers=config.num_workers)

    # `Recent` finds NaN and names the step. JAX's own search for it fails in compiled functions such as these.
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        noted_signals() as signals,
        closing(reporter),
        closing(batches),
    ):
        if steps.preview:
            reporter.beginning(flatten(config), _first_images(setup, steps.preview))

        def evaluate(step: int, state: TrainState) -> dict[str, float] | None:
            """Returns the scores of a state; None if a signal arrived meanwhile."""
            # Of several processes, none may leave an evaluation before the others.
            stopping = () if several else signals
            try:
                scores, by_class = _evaluate(setup, steps.eval_steps, state, stopping=stopping)
            except _Abandoned:
                return None
            if step == start:  # saved without its scores, because a signal had ended this evaluation
                checkpoints.add_scores(step, scores)
            balanced = bool(config.class_weights) or config.best_by == "balanced_accuracy"
            reporter.evaluation(step, scores, balanced=balanced, best_by=config.best_by)
            of_class = "average_precision" if setup.multi_label else "accuracy"
            reporter.by_class(step, by_class, tag=f"{setup.scored}_class_{of_class}")
            if on_evaluation:
                on_evaluation({"step": step, **scores})
            return scores

        if lacks_scores:
            scores = evaluate(start, state)
            if scores is None:
                raise Interrupted(signals[0], start)
            best.improves(scores)
            if start < intervals.total_steps and _stops_early(config, workdir, start):
                return
        unlogged = Unlogged(workdir)
        recent = Recent(config.batch_size, unlogged.read(start))
        for step, batch in enumerate(recent.timing(batches), start + 1):
            update = steps.updates[size_of_update(config, step - 1)]
            state, metrics = update(state, sharding.put_batch({**batch, **signal_row(signals)}, setup.mesh))
            recent.add(step, metrics)
            reporter.advance()

            if intervals.log(step):
                reporter.training(step, recent.summary() | skipped)
            elif step == start + 1:
                reporter.first_update(step, metrics)

            scores = None
            if intervals.evaluate(step):
                with recent.paused():
                    scores = evaluate(step, state)

            # Read once per step: a signal that arrives after this line stops the run after the next step.
            stopping = recent.signal if several else next(iter(signals), 0)
            is_best, last = best.improves(scores), step == intervals.total_steps
            early = bool(scores) and not last and _stops_early(config, workdir, step)
            if early and not intervals.log(step):
                reporter.training(step, recent.summary() | skipped)
            if is_best or intervals.save(step) or stopping or early:
                with recent.paused():
                    unlogged.write(step, recent.fetched)
                    checkpoints.save(step, state, scores)
            if early:
                return
            abandoned = scores is None and intervals.evaluate(step)
            if stopping and (not last or abandoned):
                raise Interrupted(stopping, step)


def _start_tracker(config: ConfigDict, workdir: Path) -> Tracker | None:
    """Returns the tracker of the first process, which has the rows of metrics.jsonl already; None in the others."""
    return Tracker(config, workdir, rows=read_metrics(workdir / "metrics.jsonl")) if is_lead() else None


def _first_images(setup: Setup, preview: PreviewStep) -> np.ndarray:
    """Returns images of the first batch as the first update sees them, uint8 (n, h, w, c)."""
    return jax.device_get(preview(sharding.put_batch(setup.train_batches[0], setup.mesh)))


def _lacks_scores(intervals: Intervals, workdir: Path, step: int) -> bool:
    """Returns whether an evaluation is due after this step and metrics.jsonl has no scores of it; step 0 never has any."""

    def is_evaluated() -> bool:
        rows = read_metrics(workdir / "metrics.jsonl")
        return any(row["step"] == step and score_of(row) for row in rows)

    return step > 0 and intervals.evaluate(step) and not from_lead(is_evaluated)


def _stops_early(config: ConfigDict, workdir: Path, step: int) -> bool:
    """Returns whether the run ends after this step, because its scores became no better; says so if it does."""

    def since_best() -> int:
        rows = read_metrics(workdir / "metrics.jsonl")
        return evals_since_best((row for row in rows if row["step"] <= step), best_by=config.best_by)

    limit = config.early_stopping_evals
    early = limit > 0 and from_lead(since_best) >= limit
    if early:
        print(
            f"stopped early at step {step}: the last {limit} evaluations had no better {config.best_by}\n"
            f"  (early_stopping_evals={limit}; a greater value, or 0, continues the run)",
            flush=True,
        )
    return early


class _Abandoned(Exception):
    """A signal arrived during an evaluation, which may take longer than there is time."""


def _evaluate(
    setup: Setup, steps: Mapping[int, EvalStep], state: TrainState, *, stopping: Sequence[int]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the scores of config.test_split, and the accuracy or average precision per class by class name.

    Raises:
      _Abandoned: `stopping` got an element meanwhile.
    """

    def until_signal(batches):
        for batch in batches:
            if stopping:
                raise _Abandoned
            yield batch

    num_batches = len(setup.test_batches)
    batches = iterate(setup.test_batches, 0, num_batches, num_workers=setup.config.num_workers)
    bar = tqdm(batches, "evaluating", num_batches, leave=False, delay=2, disable=not sys.stdout.isatty())
    with closing(batches):
        summarize = label_scores if setup.multi_label else class_scores
        found = evaluate_sizes(steps, summarize, state.eval_params, until_signal(bar), mesh=setup.mesh)
    own_px, scores = setup.input_shape[0], {}
    for size_px, (of_size, _) in found.items():
        if len(setup.class_names) <= 5:
            of_size.pop("accuracy_top5", None)  # it would always be 1
        named = {f"{setup.scored}/{name}": value for name, value in of_size.items()}
        scores |= named if size_px == own_px else {sized(name, size_px): each for name, each in named.items()}
    scores |= _skipped(setup, setup.scored, setup.test_batches)
    return scores, dict(zip(setup.class_names, found[own_px][1].tolist(), strict=True))


def _skipped(setup: Setup, name: str, batches: TrainBatches | TestBatches) -> dict[str, float]:
    """Returns how many images of a split are left out, by its name in metrics.jsonl; {} if none may be."""
    return {f"{name}/skipped_images": batches.examples.skipped} if setup.config.skip_bad_images else {}


def _finish(workdir: Path, best: BestCheckpoint | None, *, best_by: str, seconds: float) -> dict[str, float]:
    """Prints the result and where it is; returns the last scores."""
    evaluations = [row for row in read_metrics(workdir / "metrics.jsonl") if score_of(row)]
    last = evaluations[-1] if evaluations else {}
    elapsed = f"in {tqdm.format_interval(seconds)}"
    if score := score_of(last, best_by):
        print(f"done: {score} after {last['step']} steps, {elapsed}")
    else:
        print(f"done: {elapsed}")
    if best:
        shown_best = best.score.amount if best.score.name == "accuracy" else best.score
        print(f"best: {shown_best} at step {best.step}; predict, evaluate and export use this checkpoint")
    print(f"in {printable(shown(workdir))}: checkpoints, metrics.jsonl, config, class names")
    print(f"curves: python -m mlpmixer_flax.analyze --workdir={shown(workdir)}")
    return last
