"""Saves the checkpoints of a run in the background, with Orbax, and restores them exactly."""

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mlpmixer_flax import UserError
from mlpmixer_flax.rundir import Accuracy, accuracy_of
from mlpmixer_flax.training.step import TrainState


class BestCheckpoint(NamedTuple):
    """The checkpoint with the best accuracy; of equal ones, the newest."""

    step: int
    accuracy: Accuracy


class Checkpoints:
    """The checkpoints of a run: the newest `keep` ones and the one with the best accuracy are kept."""

    def __init__(self, workdir: Path, *, keep: int):
        self.folder = workdir.absolute() / "checkpoints"
        self._keep = keep
        self._drop_damaged_metrics()
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        def accuracy(metrics):
            found = accuracy_of(metrics)
            assert found  # other metrics are not saved, or dropped
            return found.value

        newest = policies.LatestN(self._keep)
        best = policies.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            best_fn=accuracy,  # without it, Orbax stores no metrics
            cleanup_tmp_directories=True,  # removes checkpoints that a killed run did not finish
        )
        return ocp.CheckpointManager(epath.Path(self.folder), options=options)

    def _drop_damaged_metrics(self) -> None:
        """Removes metrics files without a readable accuracy: with one, Orbax would open no checkpoint at all.

        The checkpoint beside such a file can still be restored, but can never be the best.
        """
        for file in self.folder.glob("*/metrics/metrics"):
            accuracy = None
            with contextlib.suppress(ValueError):
                accuracy = accuracy_of(json.loads(file.read_text()))
            if accuracy is None:
                shutil.rmtree(file.parent)

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Saves a state, unless this step is saved already. Returns when the state is copied off the devices.

        `metrics` are the scores of this state; None if it was not evaluated.
        """
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def restore(self, like: TrainState) -> tuple[int, TrainState | None]:
        """Returns (step, state) of the newest checkpoint that can be read, or (0, None) if none exists.

        `like` is a state with shapes, dtypes and placements only. Damaged checkpoints that are newer than the one read
        are reported and moved to `<workdir>/damaged`.

        Raises:
          UserError: checkpoints exist, but none can be read.
        """
        failures = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            except Exception as error:  # of any class: from Orbax, TensorStore or JSON
                failures[step] = " ".join(str(error).split())[:150]
                print(f"checkpoint {step} cannot be read, trying the one before: {failures[step]}")
            else:
                if failures:
                    self._set_aside(failures)
                return step, cast(TrainState, state)  # it has the structure of `like`
        if failures:
            raise UserError(
                f"none of the checkpoints {', '.join(map(str, failures))} in {self.folder} can be read: "
                "choose another --workdir to start over"
            )
        return 0, None

    def _set_aside(self, steps: Iterable[int]) -> None:
        damaged = self.folder.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        for step in steps:
            shutil.rmtree(damaged / str(step), ignore_errors=True)
            shutil.move(self.folder / str(step), damaged / str(step))
        self._manager.close()
        self._manager = self._open()

    def best(self) -> BestCheckpoint | None:
        """Returns the best checkpoint, or None if no state was saved with an accuracy."""
        self._manager.wait_until_finished()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        found = {step: accuracy_of(scores) for step, scores in metrics.items()}
        scored = [BestCheckpoint(step, accuracy) for step, accuracy in found.items() if accuracy]
        return max(scored, key=lambda one: (one.accuracy.value, one.step), default=None)

    def close(self) -> None:
        """Waits until everything is on disk, and closes the files."""
        self._manager.wait_until_finished()
        self._manager.close()
