"""The checkpoints of a run: saved in the background by Orbax, restored exactly."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mlpmixer_flax import UserError
from mlpmixer_flax.rundir import BEST_BY


class Checkpoints:
    """Keeps the newest `keep` checkpoints of a run and the one with the best test accuracy; saves in the background."""

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
            cleanup_tmp_directories=True,  # checkpoints that a killed run had not finished writing
        )
        return ocp.CheckpointManager(epath.Path(self.folder), options=options)

    def _drop_damaged_metrics(self) -> None:
        """Removes metrics files that cannot be read, because Orbax would open no checkpoint beside one.

        Such a checkpoint can still be restored, but can never be the best.
        """
        for file in self.folder.glob("*/metrics/metrics"):
            try:
                json.loads(file.read_text())
            except ValueError:
                shutil.rmtree(file.parent)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Saves a state, unless this step is saved already; returns as soon as the state is copied off the devices."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=metrics, force=True)

    def restore(self, like: Any, sharding: jax.sharding.Sharding) -> tuple[int, Any]:
        """Returns (step, state) of the newest checkpoint that can be read, or (0, None) if none exists.

        `like` is a tree of shapes and dtypes. Damaged checkpoints newer than the one read are reported and
        moved to `<workdir>/damaged`.

        Raises:
          UserError: checkpoints exist, but none can be read.
        """
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
        failures = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
            except Exception as error:  # of any class: from Orbax, TensorStore or JSON
                failures[step] = " ".join(str(error).split())[:150]
                print(f"checkpoint {step} cannot be read, so the one before is tried: {failures[step]}")
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
        """Returns (step, test accuracy) of the best checkpoint, or None if none was saved with an accuracy."""
        self._manager.wait_until_finished()
        scored = [(self._manager.metrics(step), step) for step in self._manager.all_steps()]
        scored = [(metrics[BEST_BY], step) for metrics, step in scored if metrics]
        return max((accuracy, step) for accuracy, step in scored)[::-1] if scored else None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
