"""Reads the weights of a run: of its newest or best checkpoint, or of any other, and their scores."""

import contextlib
import functools
import logging
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.checksums import check_files, without_checksums
from mlpmixer_flax.faults import check_readable, in_one_line, pass_on, start_devices
from mlpmixer_flax.reading import check_files_in, read_json
from mlpmixer_flax.remote import fetch, shown
from mlpmixer_flax.rundir import read_class_names, read_config, read_config_of_run, saved_steps

CHECKPOINTS = ("last", "best", "ema")  # the names of a run's weights; `open_run` explains them
SCORED = ("validation", "test")  # what the names of scores begin with: "validation/accuracy"
# The values of config.best_by -> the largest possible value, and whether lower values are better
BEST_BY = {
    "accuracy": (1, False),
    "balanced_accuracy": (1, False),
    "mean_average_precision": (1, False),
    "loss": (sys.float_info.max, True),
}


Shapes = Mapping[str, tuple[int, ...]]  # by the name of a parameter, "head/kernel"
Check = Callable[[dict[str, Any], list[str], Shapes], None]  # see `open_run`


class Score(NamedTuple):
    """A score of an evaluation during training."""

    value: float  # 0 or more
    scored: str  # one of SCORED
    name: str = "accuracy"  # one of BEST_BY

    @property
    def rank(self) -> float:
        """The value, or minus the value of a loss: greater is better."""
        return -self.value if BEST_BY[self.name][1] else self.value

    @property
    def amount(self) -> str:
        """The value as text: "95.20%", or "0.1234" for a loss."""
        return f"{self.value:.4f}" if self.name == "loss" else f"{self.value:.2%}"

    def __str__(self) -> str:
        return f"{self.scored} {self.name.replace('_', ' ')} {self.amount}"


@dataclass(frozen=True)
class Run:
    """A run, as read from its directory."""

    config: dict[str, Any]  # as plain data
    class_names: list[str]  # in the order of the head's outputs
    step: int  # of the checkpoint that has the weights
    params: dict[str, Any]  # a tree of float32 numpy arrays
    scores: dict[str, Any]  # of these weights, by name ("test/accuracy"); {} if they were not evaluated


def open_run(workdir: Path, checkpoint: str | None = None, *, check: Check | None = None) -> Run:
    """Reads a run and one set of its weights; changes nothing, and works while the run is in training.

    Args:
      workdir: the run directory.
      checkpoint: "best": the weights with the best validation score, or test score if the run was evaluated on a
        test split; config.best_by says which score, usually the accuracy; they are an EMA if the run keeps one.
        "last": the parameters of the newest checkpoint. "ema": their moving average, if the run keeps one. The
        number of a saved step, "300": its weights; they are an EMA if the run keeps one. None: as
        `default_checkpoint` says.
      check: is called with the config, the class names, and the shapes of the weights before they are read.

    Raises:
      UserError: the directory is not a run directory, or the weights do not exist or cannot be read.
    """
    config = read_config_of_run(workdir)
    checkpoint = checkpoint or default_checkpoint(workdir)

    def check_weights(shapes: Shapes) -> None:
        if check:
            check(config, read_class_names(workdir), shapes)

    step, params = read_weights(workdir, checkpoint, check_weights)
    ema_evaluated = checkpoint == "last" and config["ema_decay"]  # the scores are then those of other weights
    scores = {}
    if not ema_evaluated:
        with contextlib.suppress(OSError):  # a checkpoint without scores
            scores = read_scores(workdir / "checkpoints" / str(step))
    return Run(config, read_class_names(workdir), step, params, scores)


def default_checkpoint(workdir: Path) -> str:
    """Returns which weights to use unless told otherwise: "best", if a checkpoint has a score.

    Otherwise they are those that would be evaluated: "ema" if the run keeps an EMA, else "last".

    Raises:
      UserError: the directory is not a run directory.
    """
    config = read_config_of_run(workdir)
    return "best" if _scores(workdir) else "ema" if config["ema_decay"] else "last"


def describe_weights(workdir: Path, checkpoint: str, *, step: int, size_px: int = 0) -> str:
    """Returns which weights were read, for a message: "step 300, the best checkpoint (test accuracy 95.20%)".

    Args:
      checkpoint: as for `open_run`, but not None.
      step: of the weights.
      size_px: that the score is of, to be named with it; 0 = it is not.
    """
    score, has_ema = _scores(workdir).get(step), read_config_of_run(workdir)["ema_decay"]
    kinds = {"best": "the best checkpoint", "last": "the newest checkpoint", "ema": "the newest checkpoint"}
    parts = [f"step {step:,}"] + ([kinds[checkpoint]] if checkpoint in kinds else [])
    if score and (checkpoint != "last" or not has_ema):  # otherwise the score is that of the EMA
        parts[-1] += f" ({score}{f' at {size_px} px' * bool(size_px)})"
    if has_ema:
        parts.append("without EMA" if checkpoint == "last" else "EMA weights")
    return ", ".join(parts)


def score_of(scores: Any, name: str = "accuracy") -> Score | None:
    """Returns the score of a name of BEST_BY in scores, such as a row of metrics.jsonl; None if there is none."""
    for scored in SCORED:
        value = scores.get(f"{scored}/{name}") if isinstance(scores, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= BEST_BY[name][0]:
            return Score(value, scored, name)
    return None


def sized(name: str, size_px: int) -> str:
    """Returns what a score is called at another size than the model's own: "test/accuracy_24px"."""
    return f"{name}_{size_px}px"


def split_size(name: str) -> tuple[str, int]:
    """Returns the name and the size of a score that `sized` named; the size is 0 if it is the model's own."""
    found = re.fullmatch(r"(.+)_(\d{1,4})px", name)
    return (found[1], int(found[2])) if found else (name, 0)


def read_weights(
    workdir: Path, which: str = "last", check: Callable[[Shapes], None] | None = None
) -> tuple[int, dict[str, Any]]:
    """Returns (step, tree of float32 numpy arrays) of the weights that `which` names.

    `which` is one of CHECKPOINTS or the number of a saved step; see `open_run`, also for `check`.

    Raises:
      UserError: the run has no such weights, or they cannot be read.
    """
    start_devices()  # Orbax does it otherwise, and its error would be taken for a damaged checkpoint
    for _ in range(3):
        step = _find_step(workdir, which)
        try:
            folder = fetch((workdir / "checkpoints" / str(step)).absolute(), _of_weights)
            part = "weights" if (folder / "weights").exists() else "default"
            check_files_in(folder)  # otherwise Orbax may wait for ever
            checked = check_files(folder, part)
            params = _restore(folder / part, which, check, name=shown(workdir))
        except UserError:
            raise
        except Exception as error:  # of any class: from Orbax, TensorStore or JSON
            folder = workdir / "checkpoints" / str(step)
            pass_on(error, folder)
            check_readable(folder)
            reason = in_one_line(error)
        else:
            if not checked:
                print(without_checksums(step), file=sys.stderr)
            _check_finite(params, f"{shown(workdir)}, step {step}")
            return step, params
        # A run in training removes a checkpoint when a newer or better one is saved: then that one is read.
        if step in saved_steps(workdir):
            break
    raise UserError(f"checkpoint {step} in {shown(workdir)} cannot be read ({reason}): choose another")


def _of_weights(names: Collection[str]) -> list[str]:
    """Returns which files of a checkpoint have the weights; earlier versions saved them with all the rest."""
    weights = [name for name in names if name.startswith("weights/")]
    return weights or [name for name in names if name.startswith("default/")]


def _check_finite(params: dict[str, Any], name: str) -> None:
    bad = next((array for array in jax.tree.leaves(params) if not np.isfinite(array).all()), None)
    if bad is not None:
        raise UserError(
            f"the weights of {name} have values that are not finite, so training had diverged: choose an earlier step"
        )


def _find_step(workdir: Path, which: str) -> int:
    steps = saved_steps(workdir)
    if which == "best":
        scores = _scores(workdir)
        steps = sorted(scores, key=lambda step: (scores[step].rank, step))
    elif which not in CHECKPOINTS:
        steps = [_saved_step(workdir, which)]
    if not steps:
        raise UserError(
            f"{shown(workdir)} has no checkpoint{' with a score' * (which == 'best')}: train first"
        )
    return steps[-1]


def _restore(
    folder: Path, which: str, check: Callable[[Shapes], None] | None, *, name: str
) -> dict[str, Any]:
    with _without_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        if which == "ema" and stored["ema"] is None:
            raise UserError(f"the run in {name} keeps no EMA of its weights: choose last or best")
        tree = "params" if which == "last" or stored["ema"] is None else "ema"
        wanted = {tree: stored[tree]}  # without the optimizer's state
        arrays: dict[str, Any] = flatten_dict(stored[tree], sep="/")
        # A small file of zeros could fill the memory.
        for key, array in arrays.items():
            if array.storage and math.prod(array.storage.chunk_shape or ()) > math.prod(array.shape):
                raise ValueError(f"its array {key} is stored in parts larger than it")
        if check:
            check({key: tuple(array.shape) for key, array in arrays.items()})
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        restore = ocp.args.PyTreeRestore(wanted, as_numpy, partial_restore=True)
        return checkpointer.restore(folder, args=restore)[tree]


def _saved_step(workdir: Path, which: str) -> int:
    """Returns the number of a step; raises UserError if the run has no checkpoint of it."""
    steps = [str(step) for step in saved_steps(workdir)]
    if which not in steps:
        earlier = "…, " if len(steps) > 10 else ""
        raise UserError(
            f"{shown(workdir)} has no weights {which!r:.40}: choose one of {', '.join(CHECKPOINTS)}, or a step it has saved "
            f"({earlier}{', '.join(steps[-10:]) or 'none yet'})"
        )
    return int(which)


def read_scores(checkpoint: Path) -> dict[str, Any]:
    """Returns the scores of a checkpoint by name; {} if they are damaged.

    Raises:
      OSError: they cannot be read.
    """
    with contextlib.suppress(ValueError):
        check_files(checkpoint, "metrics")
        scores = read_json(checkpoint / "metrics" / "metrics")
        if any(score_of(scores, name) for name in BEST_BY):
            return scores
    return {}


def _scores(workdir: Path) -> dict[int, Score]:
    """Returns step -> score of the checkpoints that have the score of config.best_by."""
    found, named = {}, read_config(workdir).get("best_by")
    name = named if named in (*BEST_BY,) else "accuracy"  # as in runs of earlier versions
    for step in saved_steps(workdir):
        file = workdir / "checkpoints" / str(step) / "metrics" / "metrics"
        if not file.exists():
            continue
        scores = {}
        try:
            scores = read_scores(workdir / "checkpoints" / str(step))
        except OSError as error:
            pass_on(error, file)
        if score := score_of(scores, name):
            found[step] = score
        elif not scores and file.exists():  # a run in training may have removed it
            _say_not_used(workdir, step)
    return found


@functools.lru_cache  # a program asks for the scores several times
def _say_not_used(workdir: Path, step: int) -> None:
    print(f"the scores of checkpoint {step} are damaged and are not used", file=sys.stderr)


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
