"""Begins or continues a run: everything that is checked, decided, printed and written before its first update."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict, flatten, in_steps
from mlpmixer_flax.data.class_counts import describe_classes
from mlpmixer_flax.dataloader import check_workers
from mlpmixer_flax.remote import shown
from mlpmixer_flax.rundir import saved_steps, write_run
from mlpmixer_flax.text import printable
from mlpmixer_flax.training import continuing, record
from mlpmixer_flax.training.advice import why_cpu
from mlpmixer_flax.training.class_weights import describe_class_weights
from mlpmixer_flax.training.lock import RunLock
from mlpmixer_flax.training.microbatches import describe_microbatches
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.training.processes import check_same, check_shared, from_lead, is_lead, same_fate
from mlpmixer_flax.training.resolutions import sizes_of
from mlpmixer_flax.training.setup import Setup, initial_params, make_setup, settle, to_store
from mlpmixer_flax.training.table import summarize
from mlpmixer_flax.training.tracker import check_tracker, forget_run
from mlpmixer_flax.training.validate import read_stored


def agree_on_workdir(workdir: str | Path) -> Path:
    """Returns the run directory of the first process; it, which prints the path, keeps it as it was given."""
    given = Path(from_lead(lambda: str(continuing.usable_workdir(workdir))))
    everywhere = Path(from_lead(lambda: str(given.absolute())))
    return given if is_lead() else everywhere


def begin(
    config: ConfigDict, workdir: Path, *, stored: Mapping[str, Any], lock: RunLock
) -> tuple[Setup, Params | None]:
    """Checks that the run can begin or continue, describes it, takes the lock and writes the config.

    Returns the setup, and the parameters to begin with: None = random ones, or those of a checkpoint.

    Args:
      stored: the config in the run directory, or {} if the run begins.
    """
    with same_fate():
        config = settle(config, stored)
        changes = continuing.compare_configs(workdir, stored, to_store(config))
        lock.check()
        setup = make_setup(config)
        for batches in (setup.train_batches, setup.test_batches):
            check_workers(batches, config.num_workers)
        data = record.make_record(config, setup.train_batches.examples, setup.test_batches.examples)
        if setup.teacher:
            data[record.TEACHER] = setup.teacher.digest
        if is_lead():
            check_tracker(config.tracker)
            _check_continuing(setup, workdir, changes, data=data)
    _check_processes(setup, data)
    saved = from_lead(lambda: saved_steps(workdir))
    with same_fate():
        params = None if saved else initial_params(setup)
        if is_lead():
            _describe(setup, workdir)
            if changes:
                print(continuing.describe_changes(changes), flush=True)
            lock.take()
            if read_stored(workdir) != stored:
                raise UserError(
                    f"another process has begun a run in {shown(workdir)} meanwhile: choose another --workdir"
                )
            if not stored:
                forget_run(workdir)
            write_run(workdir, to_store(config), class_names=setup.class_names, data=data)
    check_shared(workdir)
    return setup, params


def _check_continuing(
    setup: Setup, workdir: Path, changes: list[continuing.Change], *, data: Mapping[str, Any]
) -> None:
    """Checks classes, data and length of a run that has checkpoints; otherwise it begins anew."""
    if saved_steps(workdir):
        continuing.check_class_names(workdir, setup.class_names)
        moved = [change for change in changes if change.key in continuing.MOVABLE]
        record.check_data(workdir, record.read_record(workdir), data, moved=moved)
        continuing.check_length(workdir, setup.config, steps_per_epoch=setup.steps_per_epoch)


def _check_processes(setup: Setup, data: Mapping[str, Any]) -> None:
    """Checks that all processes of the run have the same config and see the same data."""
    if jax.process_count() == 1:
        return
    own = ("data_dir", "cache_bytes", "num_workers")  # may differ from machine to machine
    flat = {key: value for key, value in flatten(setup.config).items() if key not in own}
    check_same("a config", flat, advice="start all processes with the same command")
    seen = {
        "training images": len(setup.train_batches.examples),
        f"{setup.scored} images": len(setup.test_batches.examples),
        "number of classes": len(setup.class_names),
        "hash": hashlib.blake2b(json.dumps([data, setup.class_names]).encode(), digest_size=8).hexdigest(),
    }
    check_same("data", seen, advice="copy the same data to all machines")


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
    if config.resolutions_px:
        print(f"each update has images of one of these sizes: {', '.join(map(str, sizes_of(config)))} px")
    if setup.class_weights is not None:
        print(describe_class_weights(setup.class_weights, setup.class_names))
    if setup.teacher:
        size = sum(array.size for array in jax.tree.leaves(setup.teacher.params))
        print(f"learns the predictions of {config.distill_from}, a Mixer with {size:,} parameters")
    if setup.overlap:
        print(
            f"{setup.overlap:,} images are in both train_split={config.train_split} and "
            f"test_split={config.test_split}:\n  the {setup.scored} scores say little about new images"
        )
    if microbatches := describe_microbatches(config, setup.mesh):
        print(microbatches)
    warmup_steps = in_steps(config.schedule, "warmup", setup.steps_per_epoch)
    if warmup_steps >= total_steps and not saved_steps(workdir):
        print(
            f"the warmup has {warmup_steps:,} steps, so the learning rate never reaches {config.optimizer.learning_rate:g}:\n"
            "  lower schedule.warmup_steps or schedule.warmup_epochs"
        )
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]  # from JAX_PLATFORMS
    if jax.default_backend() == "cpu" and chosen != "cpu":
        print(why_cpu())
    print(
        f"{total_steps:,} steps ({total_steps / setup.steps_per_epoch:.4g} epochs) of {config.batch_size} images "
        f"on {setup.mesh.size} x {jax.devices()[0].device_kind},\n  in {printable(shown(workdir))}",
        flush=True,
    )
