"""Saves the checkpoints of a run in the background, with Orbax, and restores them exactly."""

import contextlib
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.checksums import add_checksum, check_files, without_checksums, write_checksums
from mlpmixer_flax.faults import check_readable, in_one_line, pass_on
from mlpmixer_flax.reading import check_files_in
from mlpmixer_flax.remote import shown
from mlpmixer_flax.run_weights import Score, read_scores, score_of
from mlpmixer_flax.training.processes import check_shared, from_lead, gather, is_lead
from mlpmixer_flax.training.step import TrainState


class BestCheckpoint(NamedTuple):
    """The checkpoint with the best score; of equal ones, the newest."""

    step: int
    score: Score


def _items(state: TrainState) -> dict[str, Any]:
    """Returns what is saved under which name: weights are read, and checked, without the optimizer's state."""
    weights = {"params": state.params, "ema": state.ema}
    return {"weights": weights, "default": state.replace(params=None, ema=None)}


class Checkpoints:
    """The checkpoints of a run: the newest `keep` ones and the one with the best score are kept.

    `best_by` is the score, one of `run_weights.BEST_BY`.

    Saving happens in the background, so an error of a save may be raised by any later call. What a save that failed
    has written is removed, and the checkpoints before it stay as they are.

    Raises:
      UserError: permission to write the checkpoints is missing, or a file in them is a pipe or a device.
      OSError: the disk is full or at fault, or the run directory has been deleted.
    """

    def __init__(self, workdir: Path, *, keep: int, best_by: str = "accuracy"):
        self.folder = workdir.absolute() / "checkpoints"
        self._keep, self._best_by = keep, best_by
        from_lead(lambda: make_folder(self.folder))
        check_shared(self.folder)
        self._descriptor = os.open(self.folder, os.O_RDONLY)  # tells later whether the folder is still there
        from_lead(self._check_files)
        with self._judging():
            from_lead(self._drop_damaged_metrics)
            self._manager = self._open()

    @contextlib.contextmanager
    def _judging(self) -> Iterator[None]:
        """Raises faults of the disk as an OSError; Orbax and TensorStore raise them as exceptions of many classes."""
        try:
            yield
            self._check_exists()
        except Exception as error:
            pass_on(error, self.folder)
            time.sleep(0.5)  # somebody may be deleting the folder, and its files go first
            self._check_exists()
            raise

    def _check_exists(self) -> None:
        """Raises FileNotFoundError if the folder was deleted, also if Orbax has created it again since."""
        if os.fstat(self._descriptor).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder)) from None

    def _open(self) -> ocp.CheckpointManager:
        def rank(metrics):
            found = score_of(metrics, self._best_by)
            # It lacks one if it diverged, or if the run had another best_by and an earlier version of the package.
            return found.rank if found else -math.inf

        newest = policies.LatestN(self._keep)
        best = policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            best_fn=rank,  # without it, Orbax stores no metrics
            cleanup_tmp_directories=True,  # removes checkpoints that a killed run did not finish
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        return ocp.CheckpointManager(
            epath.Path(self.folder), options=options, item_names=("weights", "default")
        )

    def _write_checksums(self) -> None:
        """Adds checksums to the checkpoint that is being saved; Orbax calls it before it commits the checkpoint."""
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            write_checksums(unfinished)

    def _check_files(self) -> None:
        """Raises UserError if Orbax would wait for ever for a file of a checkpoint, or may not read it."""
        try:
            check_files_in(self.folder)
        except OSError as error:
            pass_on(error)  # it names the file
            raise

    def _drop_damaged_metrics(self) -> None:
        """Removes metrics files without a readable score: with one, Orbax would open no checkpoint at all.

        The checkpoint beside such a file can still be restored, but can never be the best.
        """
        for file in self.folder.glob("*/metrics/metrics"):
            if not read_scores(file.parent.parent):
                print(
                    f"the scores of checkpoint {file.parent.parent.name} are damaged and are removed",
                    flush=True,
                )
                shutil.rmtree(file.parent)

    def save(self, step: int, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Saves a state, unless this step is saved already. Returns when the state is copied off the devices.

        `metrics` are the scores of this state; None if it was not evaluated.
        """
        if step not in self._manager.all_steps():
            with self._judging():
                self._check_exists()
                args = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
                self._manager.save(step, args=ocp.args.Composite(**args), metrics=metrics, force=True)

    def add_scores(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the scores of a saved state that was not evaluated when it was saved."""

        def write() -> None:
            folder, content = self.folder / str(step), json.dumps(metrics).encode()
            add_checksum(folder, "metrics/metrics", content)
            (folder / "metrics").mkdir(exist_ok=True)
            with replacing(folder / "metrics" / "metrics") as file:
                file.write(content)

        with self._judging():
            from_lead(write)
            self._manager.close()
            self._manager = self._open()

    def restore(self, like: TrainState) -> tuple[int, TrainState | None]:
        """Returns (step, state) of the newest checkpoint that can be read, or (0, None) if none exists.

        `like` is a state with shapes, dtypes and placements only; the checkpoint may be from other placements. Damaged
        checkpoints that are newer than the one read are reported and moved to `<workdir>/damaged`.

        Raises:
          UserError: checkpoints exist, but none can be read.
        """
        failures = {}
        steps = from_lead(lambda: sorted(self._manager.all_steps(), reverse=True))
        for step in steps:
            state = failure = None
            try:
                state, checked = self._restore(step, like)
            except Exception as error:  # of any class: from Orbax, TensorStore or JSON
                pass_on(error, self.folder / str(step))
                check_readable(self.folder / str(step))
                failure = in_one_line(error)
            # It counts as damaged in all processes if one of them cannot read its part.
            failure = next(filter(None, gather(failure)), None)
            if failure:
                failures[step] = failure
                older = ", trying the one before" if step != steps[-1] else ""
                print(f"checkpoint {step} cannot be read{older}: {failure}")
            else:
                if not checked:
                    print(without_checksums(step))
                if failures:
                    self._set_aside(failures)
                return step, state
        if failures:
            raise UserError(
                f"none of the checkpoints {', '.join(map(str, failures))} in {shown(self.folder)} can be read: "
                "choose another --workdir to start over"
            )
        return 0, None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, bool]:
        """Returns the state of a step, and whether it has checksums; raises errors of many classes."""
        folder = self.folder / str(step)
        # Earlier versions saved the state as one item.
        items = _items(like) if (folder / "weights").exists() else {"default": like}
        checked = all([check_files(folder, name) for name in items])
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**args))
        return found["default"].replace(**(found["weights"] if "weights" in items else {})), checked

    def _set_aside(self, steps: Iterable[int]) -> None:
        damaged = self.folder.parent / "damaged"

        def move():
            damaged.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(damaged / str(step), ignore_errors=True)
                shutil.move(self.folder / str(step), damaged / str(step))

        from_lead(move)
        self._manager.close()
        self._manager = self._open()

    def best(self) -> BestCheckpoint | None:
        """Returns the best checkpoint, or None if no state was saved with a score."""
        with self._judging():
            self._manager.wait_until_finished()
        # Of all processes, only the first one writes metrics, so only it surely sees them.
        steps = self._manager.all_steps()
        metrics = from_lead(lambda: [[step, self._manager.metrics(step)] for step in steps])
        found = {step: score_of(scores, self._best_by) for step, scores in metrics}
        scored = [BestCheckpoint(step, score) for step, score in found.items() if score]
        return max(scored, key=lambda one: (one.score.rank, one.step), default=None)

    def close(self) -> None:
        """Waits until everything is on disk, closes the files, and removes what a failed save has left."""
        try:
            with self._judging():
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()  # does not raise the same error again
        finally:
            if is_lead():
                self._remove_remains()
            os.close(self._descriptor)

    def _remove_remains(self) -> None:
        """Removes what a failed save has left. Other threads of it may write for a moment yet, so it looks again."""
        for _ in range(20):
            remains = self._remains()
            for folder in remains:
                shutil.rmtree(folder, ignore_errors=True)
            if not remains:
                break
            time.sleep(0.2)

    def _remains(self) -> list[Path]:
        try:
            self._check_exists()
        except FileNotFoundError:
            # A save that went on meanwhile has created the folder again, unless it belongs to a new run.
            if (self.folder.parent / "config.json").exists():
                return []
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()  # only if it is empty
            return [self.folder] if self.folder.exists() else []
        return list(self.folder.glob("*.orbax-checkpoint-tmp*"))
