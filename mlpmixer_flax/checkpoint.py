"""A run on disk: a directory with its config and the like as JSON, and checkpoints by Orbax."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint import checkpoint_managers as policies

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing

BEST_BY = "test/accuracy"


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Raises UserError, and writes nothing, where a run of this config cannot use the directory."""
    stored = workdir / "config.json"
    try:
        existing = next(folder for folder in [workdir, *workdir.absolute().parents] if folder.exists())
    except OSError as error:
        raise UserError(f"cannot use workdir {workdir} ({error.strerror}): choose another") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to workdir {workdir}: {existing} is not a directory you may write to")
    if "[" in str(workdir.absolute()):
        raise UserError(
            f"cannot use workdir {workdir}: Orbax takes [ in a path for a pattern; choose another"
        )
    if not stored.exists():
        if (workdir / "checkpoints").exists():
            raise UserError(
                f"{workdir} has checkpoints but no config.json to tell whose: choose another --workdir"
            )
        return
    theirs = flatten_dict(_read_config(stored), sep=".")
    ours = flatten_dict(json.loads(json.dumps(config)), sep=".")  # tuples become lists, as in the file
    differing = [key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in differing)
        raise UserError(f"{workdir} holds a run of another config ({changes}): choose another --workdir")


def check_class_names(workdir: Path, class_names: list[str]) -> None:
    """Raises UserError where the run in a directory, if any, has other classes."""
    theirs = read_class_names(workdir) if (workdir / "class_names.json").exists() else class_names
    if theirs != class_names:
        lost, new = (
            ", ".join(map(repr, [name for name in names if name not in others][:3])) or "none"
            for names, others in ((theirs, class_names), (class_names, theirs))
        )
        raise UserError(
            f"{workdir} holds a run of other classes (gone: {lost}; new: {new}): put the dataset back as it was, or "
            "choose another --workdir"
        )


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of the run in a directory, as plain data; {} where there is no run."""
    file = workdir / "config.json"
    return _read_config(file) if file.exists() else {}


def read_run(workdir: Path) -> dict[str, Any]:
    """As `read_config`; UserError where there is no run."""
    config = read_config(workdir)
    if not {"model", "preprocess", "ema_decay", "loss"} <= config.keys():
        raise UserError(f"no run in {workdir}: it has no config.json of one; give the directory of a run")
    return config


def read_class_names(workdir: Path) -> list[str]:
    """The names of the classes, in the order of the head's outputs."""
    file = workdir / "class_names.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): the run's directory is incomplete") from None


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): choose another --workdir") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no config of a run: choose another --workdir")
    return config


def write_run(workdir: Path, config: dict[str, Any], *, class_names: list[str]) -> None:
    """Creates the directory with what later programs need beside the weights; UserError where it can't."""
    make_folder(workdir)
    contents = {"config": config, "class_names": class_names, "preprocess": config["preprocess"]}
    for name, content in contents.items():
        with replacing(workdir / f"{name}.json") as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints in a run's directory, ascending."""
    return sorted(
        int(folder.name) for folder in (workdir / "checkpoints").glob("[0-9]*") if folder.name.isdigit()
    )


def read_weights(workdir: Path, which: str = "last") -> tuple[int, Any]:
    """(step, tree of float32 numpy arrays) of a run, which is left as it is, even while it trains.

    `which` is "last": the parameters of the newest checkpoint; "ema": their moving average, where the run keeps
    one; "best": those of the best test accuracy, averaged where the run keeps an average.

    Raises UserError if there are none.
    """
    steps = saved_steps(workdir)
    if which == "best":
        files = {step: workdir / "checkpoints" / str(step) / "metrics" / "metrics" for step in steps}
        scores = {step: json.loads(file.read_text()) for step, file in files.items() if file.exists()}
        steps = sorted(scores, key=lambda step: (scores[step][BEST_BY], step))
    if not steps:
        raise UserError(
            f"{workdir} holds no checkpoint{' with a test accuracy' * (which == 'best')}: train first"
        )
    folder = (workdir / "checkpoints" / str(steps[-1]) / "default").absolute()
    try:
        with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            if which == "ema" and stored["ema"] is None:
                raise UserError(f"the run in {workdir} keeps no average of its weights: choose last or best")
            name = "params" if which == "last" or stored["ema"] is None else "ema"
            wanted = {name: stored[name]}  # and not the optimizer's state
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            restore = ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True)
            return steps[-1], checkpointer.restore(folder, args=restore)[name]
    except UserError:
        raise
    except Exception as error:  # Orbax, TensorStore and JSON each have their own
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"checkpoint {steps[-1]} in {workdir} cannot be read ({reason}): choose another"
        ) from None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax looks for metadata where it put none, and says so."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """The checkpoints of a run: the newest `keep` and the best by test accuracy, saved in the background."""

    def __init__(self, workdir: Path, *, keep: int):
        self.folder = workdir.absolute() / "checkpoints"
        self._keep = keep
        self._drop_damaged_metrics()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        def accuracy(metrics):
            return metrics[BEST_BY]

        newest = policies.LatestN(self._keep)
        best = policies.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            best_fn=accuracy,  # or no metrics are stored
            cleanup_tmp_directories=True,  # what a killed run was in the middle of writing
        )
        return ocp.CheckpointManager(epath.Path(self.folder), options=options)

    def _drop_damaged_metrics(self) -> None:
        """Orbax opens no folder with such a file in it; without its metrics a checkpoint is as good, but never best."""
        for file in self.folder.glob("*/metrics/metrics"):
            try:
                json.loads(file.read_text())
            except ValueError:
                shutil.rmtree(file.parent)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Returns once the state is copied off the devices; a step that is saved already is left alone."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def restore(self, like: Any, sharding: jax.sharding.Sharding) -> tuple[int, Any]:
        """The newest checkpoint that can be read, as (step, state); (0, None) if there is none.

        `like` is a tree of shapes and dtypes. Damaged checkpoints newer than the one read are said aloud and
        moved to `<workdir>/damaged`. Raises UserError when there are checkpoints and none can be read.
        """
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
        failures = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            except Exception as error:  # Orbax, TensorStore and JSON each have their own
                failures[step] = " ".join(str(error).split())[:150]
                print(f"checkpoint {step} cannot be read, trying the one before: {failures[step]}")
            else:
                self._set_aside(failures)
                return step, state
        if failures:
            raise UserError(
                f"none of the checkpoints {', '.join(map(str, failures))} in {self.folder} can be read: "
                "choose another --workdir to start over"
            )
        return 0, None

    def _set_aside(self, steps) -> None:
        if not steps:
            return
        damaged = self.folder.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        for step in steps:
            shutil.rmtree(damaged / str(step), ignore_errors=True)
            shutil.move(self.folder / str(step), damaged / str(step))
        self._manager.close()
        self._manager = self._open()

    def best(self) -> tuple[int, float] | None:
        """(step, test accuracy) of the best checkpoint, if one was saved with its accuracy."""
        self._manager.wait_until_finished()
        scored = [(self._manager.metrics(step), step) for step in self._manager.all_steps()]
        scored = [(metrics[BEST_BY], step) for metrics, step in scored if metrics]
        return max((accuracy, step) for accuracy, step in scored)[::-1] if scored else None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
