"""Train a Mixer: python -m mlpmixer_flax.train --config=configs/digits.py

One config file is one run; --config.KEY=VALUE changes a key of it, and every
key stands in mlpmixer_flax/config.py. The run goes to --workdir: config,
metrics, checkpoints. The same command with the same --workdir continues a run
that was stopped.
"""

import argparse
import contextlib
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

from mlpmixer_flax import sharding
from mlpmixer_flax.checkpoint import (
    BEST_BY,
    Checkpoints,
    check_class_names,
    check_workdir,
    read_config,
    saved_steps,
    write_run,
)
from mlpmixer_flax.config import flatten
from mlpmixer_flax.configfile import load_config, shipped_configs
from mlpmixer_flax.dataloader import iterate
from mlpmixer_flax.evaluate import evaluate_classes
from mlpmixer_flax.metrics import Recent, Reporter, read_metrics
from mlpmixer_flax.plan import Plan, load_weights, make_plan, settle, to_store
from mlpmixer_flax.step import TrainState
from mlpmixer_flax.tabulate import summarize
from mlpmixer_flax.terminal import exit_status
from mlpmixer_flax.validate import validate


class Interrupted(Exception):
    """A signal asked the run to stop; `args` are the signal's number and the step that is saved."""


def train(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains to the end, from the newest checkpoint in `workdir` if any; returns the last test scores.

    Raises UserError for what cannot be used, before anything is written; FloatingPointError when loss or
    weights are no longer finite; Interrupted after SIGTERM or SIGINT.
    """
    validate(config)
    config = settle(config, read_config(workdir))
    validate(config)  # again: a file may say anything of itself
    check_workdir(workdir, to_store(config))
    plan = make_plan(config)
    check_class_names(workdir, plan.info["class_names"])
    everywhere = sharding.replicated(plan.mesh)
    init = jax.jit(plan.init, out_shardings=everywhere)
    like = jax.eval_shape(init, None)
    params = None if saved_steps(workdir) or not config.init_from else load_weights(plan, like.params)
    print(summarize(plan.model, plan.input_shape, params=like.params, opt_state=like.opt_state))
    num_train, num_test = len(plan.train_batches.examples), len(plan.test_batches.examples)
    print(
        f"{config.dataset}: {num_train:,} training images, {num_test:,} test images, "
        f"{plan.info['num_classes']} classes\n{plan.total_steps:,} steps of {config.batch_size} images "
        f"on {plan.mesh.size} x {jax.devices()[0].device_kind}, in {workdir}",
        flush=True,
    )
    write_run(workdir, to_store(config), class_names=plan.info["class_names"])
    with contextlib.closing(Checkpoints(workdir, keep=config.keep_checkpoints)) as checkpoints:
        start, state = checkpoints.restore(like, everywhere)
        if start:
            print(f"continuing from step {start} of {workdir}", flush=True)
        if start < plan.total_steps:
            state = init(params) if state is None else state
            del params
            update, score = _compile(plan, state)
            reporter = Reporter(workdir, start_step=start, total_steps=plan.total_steps)
            with contextlib.closing(reporter):
                _run(plan, update, score, state, start=start, checkpoints=checkpoints, reporter=reporter)
        best = checkpoints.best()
    return _finish(workdir, best)


def _run(
    plan: Plan,
    update: Callable,
    score: Callable,
    state: TrainState,
    *,
    start: int,
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> None:
    """The loop: steps start + 1 to the last, with logging, evaluation and saving on their intervals."""
    config, mesh = plan.config, plan.mesh
    best = checkpoints.best()
    best_accuracy = best[1] if best else 0.0
    recent = Recent(config.batch_size)
    batches = iterate(plan.train_batches, start, plan.total_steps, num_workers=config.num_workers)
    with _watch_signals() as caught, contextlib.closing(batches):
        for step, batch in enumerate(batches, start + 1):
            batch = sharding.put_batch(batch, mesh)
            if step == 1:
                with recent.paused():
                    look = jax.jit(plan.look, out_shardings=sharding.replicated(mesh))
                    reporter.beginning(flatten(config), jax.device_get(look(batch)))
            state, metrics = update(state, batch)
            recent.add(step, metrics)
            reporter.advance()

            def due(every, step=step):
                return step == plan.total_steps or (every and step % every == 0)

            if due(config.log_every_steps):
                reporter.training(step, recent.summary())
            scores = None
            if due(plan.eval_every):
                with recent.paused():
                    scores, by_class = _evaluate(plan, score, state)
                reporter.evaluation(step, scores)
                reporter.class_accuracy(step, by_class)
            is_best = scores is not None and scores[BEST_BY] >= best_accuracy
            if is_best or due(plan.save_every) or caught:
                with recent.paused():
                    checkpoints.save(step, state, scores)
            if is_best:
                best_accuracy = scores[BEST_BY]
            if caught and step < plan.total_steps:
                raise Interrupted(caught[0], step)


def _compile(plan: Plan, state: TrainState) -> tuple[Callable, Callable]:
    """Both step functions compiled for the shapes of this run, at once and before any timing."""
    started = time.monotonic()
    everywhere, rows = sharding.replicated(plan.mesh), sharding.split_by_rows(plan.mesh)
    n = plan.config.batch_size

    def shapes(examples):
        return {
            "image": jax.ShapeDtypeStruct((n, *examples.image_shape), jnp.uint8, sharding=rows),
            "label": jax.ShapeDtypeStruct((n,), jnp.int32, sharding=rows),
            "mask": jax.ShapeDtypeStruct((n,), bool, sharding=rows),
        }

    update = jax.jit(plan.update, donate_argnums=0, out_shardings=everywhere)
    score = jax.jit(plan.score, out_shardings=everywhere)
    jobs = [
        (update, state, shapes(plan.train_batches.examples)),
        (score, state.eval_params, shapes(plan.test_batches.examples)),
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        compiled = pool.map(lambda job: job[0].lower(*job[1:]).compile(), jobs)
        update, score = compiled
    print(f"compiled in {time.monotonic() - started:.1f} s, which no speed below includes", flush=True)
    return update, score


def _evaluate(plan: Plan, score: Callable, state: TrainState) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the test split, and the accuracy of each class by its name."""
    batches = iterate(plan.test_batches, 0, len(plan.test_batches), num_workers=plan.config.num_workers)
    bar = tqdm(
        batches, "evaluating", len(plan.test_batches), leave=False, delay=2, disable=not sys.stdout.isatty()
    )
    with contextlib.closing(batches):
        scores, by_class = evaluate_classes(score, state.eval_params, bar, mesh=plan.mesh)
    # Of five classes or fewer one of the five likeliest is always right.
    told = [name for name in scores if name != "accuracy_top5" or plan.info["num_classes"] > 5]
    scores = {f"test/{name}": scores[name] for name in told}
    return scores, dict(zip(plan.info["class_names"], by_class.tolist(), strict=True))


@contextlib.contextmanager
def _watch_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to; the second one acts as it always does."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return

    def note(number, frame):
        caught.append(number)
        signal.signal(number, before[number])
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping after this step; a second one stops at once\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(workdir: Path, best: tuple[int, float] | None) -> dict[str, float]:
    """Prints what came out and where it lies; returns the last test scores."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if BEST_BY in row]
    last = rows[-1] if rows else {}
    print(f"done: test accuracy {last[BEST_BY]:.2%} after {last['step']} steps" if last else "done")
    if best:
        print(f"best: {best[1]:.2%} at step {best[0]}")
    print(f"in {workdir}: checkpoints, metrics.jsonl, config, names of the classes")
    print(f"curves: python -m mlpmixer_flax.analyze --workdir={workdir}")
    return last


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m mlpmixer_flax.train --config=configs/digits.py\n"
        "  python -m mlpmixer_flax.train --config=configs/mnist.py --workdir=runs/mnist \\\n"
        "      --config.total_epochs=3 --config.optimizer.learning_rate=1e-3\n"
        "configs of the package:\n"
        + textwrap.fill("  " + " ".join(shipped_configs()), 79, subsequent_indent="  "),
    )
    parser.add_argument("--config", required=True, help="config file; those of the package are found by name")
    parser.add_argument("--workdir", type=Path, help="directory of the run (default: runs/CONFIG-TIME)")
    arguments, arguments.overrides = parser.parse_known_args(argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 1 diverged, 2 unusable input, 128 + n stopped by signal n."""
    arguments = parse(argv)
    return exit_status(
        lambda: _train(arguments),
        interrupted="stopped at once; a run continues from its newest checkpoint, if there is one",
    )


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    name = f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = arguments.workdir or Path("runs") / name
    try:
        train(config, workdir)
    except Interrupted as stop:
        number, step = stop.args
        name = signal.Signals(number).name
        print(f"{name}: saved step {step}; the same command with --workdir={workdir} continues from there")
        return 128 + number
    return 0


if __name__ == "__main__":
    sys.exit(main())
