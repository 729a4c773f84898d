"""Reads and writes run directories: the config, class names and weights of a run.

Training writes them; all later programs read them.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing

BEST_BY = "test/accuracy"
CHECKPOINTS = ("last", "best", "ema")  # the names of a run's weights; `open_run` explains them


@dataclass(frozen=True)
class Run:
    """A run, as read from its directory."""

    config: dict[str, Any]  # as plain data
    class_names: list[str]  # in the order of the head's outputs
    step: int  # of the checkpoint that has the weights
    params: dict[str, Any]  # a tree of float32 numpy arrays


def open_run(workdir: Path, checkpoint: str | None = None) -> Run:
    """Reads a run and one set of its weights; changes nothing, and works while the run is in training.

    Args:
      workdir: the run directory.
      checkpoint: "last": the parameters of the newest checkpoint. "ema": their moving average, if the run
        keeps one. "best": the weights with the best test accuracy; they are an EMA if the run keeps one.
        None: the weights of the last test accuracy: "ema" if the run keeps an EMA, else "last".

    Raises:
      UserError: the directory is not a run directory, or the weights do not exist or cannot be read.
    """
    config = read_config(workdir)
    if not {"model", "preprocess", "ema_decay", "loss"} <= config.keys():
        raise UserError(f"no run in {workdir}: it has no config.json of a run; give the directory of a run")
    step, params = read_weights(workdir, checkpoint or ("ema" if config["ema_decay"] else "last"))
    return Run(config, read_class_names(workdir), step, params)


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the config of a run as plain data, or {} if the directory has no config.json.

    Raises:
      UserError: config.json cannot be read.
    """
    file = workdir / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): choose another --workdir") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not the config of a run: choose another --workdir")
    return config


def read_class_names(workdir: Path) -> list[str]:
    """Returns the class names, in the order of the head's outputs.

    Raises:
      UserError: class_names.json does not exist or cannot be read.
    """
    file = workdir / "class_names.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): the run directory is incomplete; choose another"
        ) from None


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in ascending order."""
    return sorted(
        int(folder.name) for folder in (workdir / "checkpoints").glob("[0-9]*") if folder.name.isdigit()
    )


def read_weights(workdir: Path, which: str = "last") -> tuple[int, dict[str, Any]]:
    """Returns (step, tree of float32 numpy arrays) of the weights that `which`, one of CHECKPOINTS, names.

    Raises:
      UserError: the run has no such weights, or they cannot be read.
    """
    steps = saved_steps(workdir)
    if which == "best":
        accuracies = _test_accuracies(workdir)
        steps = sorted(accuracies, key=lambda step: (accuracies[step], step))
    if not steps:
        raise UserError(
            f"{workdir} has no checkpoint{' with a test accuracy' * (which == 'best')}: train first"
        )
    folder = (workdir / "checkpoints" / str(steps[-1]) / "default").absolute()
    try:
        with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            if which == "ema" and stored["ema"] is None:
                raise UserError(f"the run in {workdir} keeps no EMA of its weights: choose last or best")
            name = "params" if which == "last" or stored["ema"] is None else "ema"
            wanted = {name: stored[name]}  # without the optimizer's state
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            restore = ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True)
            return steps[-1], checkpointer.restore(folder, args=restore)[name]
    except UserError:
        raise
    except Exception as error:  # of any class: from Orbax, TensorStore or JSON
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"checkpoint {steps[-1]} in {workdir} cannot be read ({reason}): choose another"
        ) from None


def _test_accuracies(workdir: Path) -> dict[int, float]:
    """Returns step -> test accuracy of the checkpoints that have one."""
    accuracies = {}
    for step in saved_steps(workdir):
        file = workdir / "checkpoints" / str(step) / "metrics" / "metrics"
        with contextlib.suppress(OSError, ValueError):  # does not exist, or is damaged
            accuracies[step] = json.loads(file.read_text())[BEST_BY]
    return accuracies


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides Orbax's warning about missing metadata, which it did not write in the first place."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Checks that a run with this config can use the directory; writes nothing.

    Raises:
      UserError: the directory cannot be written to, or it holds a run with another config.
    """
    stored = workdir / "config.json"
    try:
        existing = next(folder for folder in [workdir, *workdir.absolute().parents] if folder.exists())
    except OSError as error:
        raise UserError(f"cannot use workdir {workdir} ({error.strerror}): choose another") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to workdir {workdir}: {existing} is not a directory you may write to")
    if "[" in str(workdir.absolute()):
        raise UserError(
            f"cannot use workdir {workdir}: Orbax reads [ in a path as a pattern; choose a path without it"
        )
    if not stored.exists():
        if (workdir / "checkpoints").exists():
            raise UserError(
                f"{workdir} has checkpoints but no config.json that they belong to: choose another --workdir"
            )
        return
    theirs = flatten_dict(read_config(workdir), sep=".")
    ours = flatten_dict(json.loads(json.dumps(config)), sep=".")  # JSON turns tuples into lists
    differing = [key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {theirs.get(key)!r}, is {ours.get(key)!r}" for key in differing)
        raise UserError(f"{workdir} holds a run with another config ({changes}): choose another --workdir")


def check_class_names(workdir: Path, class_names: list[str]) -> None:
    """Checks that a run already in the directory, if there is one, has the same classes.

    Raises:
      UserError: it has others.
    """
    theirs = read_class_names(workdir) if (workdir / "class_names.json").exists() else class_names
    if theirs != class_names:
        lost, new = (
            ", ".join(map(repr, [name for name in names if name not in others][:3])) or "none"
            for names, others in ((theirs, class_names), (class_names, theirs))
        )
        raise UserError(
            f"{workdir} holds a run with other classes (gone: {lost}; new: {new}): restore the dataset, or "
            "choose another --workdir"
        )


def write_run(workdir: Path, config: dict[str, Any], *, class_names: list[str]) -> None:
    """Creates the directory and writes config and class names, which later programs need besides the weights.

    Raises:
      UserError: they cannot be written.
    """
    make_folder(workdir)
    contents: dict[str, Any] = {"config": config, "class_names": class_names}
    for name, content in contents.items():
        with replacing(workdir / f"{name}.json") as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
