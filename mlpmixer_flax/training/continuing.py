"""Decides whether a run can begin or continue in a directory: its place, config, classes and length."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.config import CHANGE_NO_UPDATE, LENGTH, ConfigDict, get_config, in_steps, resolve
from mlpmixer_flax.data.files import check_no_url
from mlpmixer_flax.limits import show
from mlpmixer_flax.remote import shown
from mlpmixer_flax.rundir import read_class_names, saved_steps
from mlpmixer_flax.text import listed, shorten
from mlpmixer_flax.training.optimizer import make_schedule

MOVABLE = ("dataset", "distill_from")  # keys that name files; `record.check_data` compares their content


class Change(NamedTuple):
    """A key of the config with another value than at the start before."""

    key: str  # dotted
    before: Any
    now: Any


def usable_workdir(workdir: str | Path) -> Path:
    """Returns the path of a run directory with "~" expanded; writes nothing.

    Raises:
      UserError: no run can be written there.
    """
    if not str(workdir):
        raise UserError("the run directory has an empty name: give one, such as --workdir=runs/photos")
    check_no_url(str(workdir), name="workdir")
    if os.fsencode(workdir).decode(errors="replace") != str(workdir):
        raise UserError(f"cannot use workdir {str(workdir)!r}: its name is not valid UTF-8; choose another")
    try:
        workdir = Path(workdir).expanduser()
        existing = next(folder for folder in [workdir, *workdir.absolute().parents] if folder.exists())
        has_checkpoints = (workdir / "checkpoints").exists()  # fails if only this path is too long
    except (OSError, RuntimeError, ValueError) as error:  # ~ has no home directory; a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot use workdir {shown(Path(workdir))} ({reason}): choose another") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to workdir {shown(workdir)}: {existing} is not a directory you may write to"
        )
    if "[" in str(workdir.absolute()):
        raise UserError(
            f"cannot use workdir {workdir}: Orbax reads [ in a path as a pattern; choose a path without it"
        )
    if has_checkpoints and not (workdir / "config.json").exists():
        raise UserError(
            f"{shown(workdir)} has checkpoints but no config.json that they belong to: choose another --workdir"
        )
    return workdir


def compare_configs(workdir: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[Change]:
    """Returns the keys that have other values than in the stored config, if a run may continue with them.

    These are the keys that change no update, the length of the run (see `check_length`), and the names of dataset and
    teacher, because files may be moved (see `record.check_data`).

    Args:
      stored: the config in the run directory as plain data, or {} when the run begins. A key that is new in this
        version of the package counts as having its value in the base config.
      config: the config to continue with, as plain data.

    Raises:
      UserError: another key differs.
    """
    if not stored:
        return []
    base = resolve(get_config(), {}).to_dict()
    before = {**_plain(base), **_plain(stored)}
    now = _plain(config)
    changes = [
        Change(key, before.get(key), now.get(key))
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    moved = {change.key for change in changes if change.key in MOVABLE and change.before and change.now}
    allowed = {*CHANGE_NO_UPDATE, *LENGTH, *moved}
    if refused := [change for change in changes if change.key not in allowed]:
        raise UserError(f"{another_config(workdir, refused)}: choose another --workdir")
    return changes


def another_config(workdir: Path, changes: Sequence[Change]) -> str:
    """Returns the first half of an error: that the run has another config, and the keys."""
    texts = [
        f"{shorten(key, 40)} was {show(before, 300)}, is {show(now, 300)}" for key, before, now in changes
    ]
    return f"{shown(workdir)} holds a run with another config ({listed(texts)})"


def describe_changes(changes: Sequence[Change]) -> str:
    """Returns a line that says with which other values a run continues."""
    texts = [
        f"{key}={shorten(str(now), 300)} (was {shorten(str(before), 300)})" for key, before, now in changes
    ]
    rounding = any(key in ("accumulation_steps", "mesh.fsdp", "model.remat") for key, _, _ in changes)
    return f"continuing with {', '.join(texts)}" + "; updates stay the same, except for rounding" * rounding


def check_class_names(workdir: Path, class_names: list[str]) -> None:
    """Checks that a run already in the directory, if there is one, has the same classes.

    Raises:
      UserError: it has others.
    """
    theirs = read_class_names(workdir) if (workdir / "class_names.json").exists() else class_names
    if theirs != class_names:
        lost, new = (
            ", ".join([show(name) for name in names if name not in others][:3]) or "none"
            for names, others in ((theirs, class_names), (class_names, theirs))
        )
        raise UserError(
            f"{shown(workdir)} holds a run with other classes (gone: {lost}; new: {new}): restore the dataset, or "
            "choose another --workdir"
        )


def check_length(workdir: Path, config: ConfigDict, *, steps_per_epoch: float) -> None:
    """Checks that a run is not to end before the step that it has already reached.

    Raises:
      UserError: it is.
    """
    total, done = in_steps(config, "total", steps_per_epoch), max(saved_steps(workdir), default=0)
    if total < done:
        raise UserError(
            f"the run in {shown(workdir)} has already done {done:,} steps ({done / steps_per_epoch:.4g} epochs), and "
            f"total_steps={config.total_steps}, total_epochs={config.total_epochs} is less ({total:,} steps): give a "
            "greater length, or choose another --workdir"
        )


def describe_length(
    stored: Mapping[str, Any], config: ConfigDict, *, start: int, steps_per_epoch: float
) -> str:
    """Returns what to print about a run whose length has changed: its new schedule. "" if the length is the same.

    The schedule is always a function of config and step alone, so it becomes that of the new length, as if the
    run had begun with this length. Constant and rsqrt schedules do not depend on the length. With cosine and
    linear, the learning rate jumps to its value on the new curve, up if the run becomes longer.

    Args:
      stored: the config of the start before, as plain data.
      start: the step that the run has reached.
    """
    if not start:
        return ""
    earlier = {**get_config(), **stored}
    before, now = (in_steps(each, "total", steps_per_epoch) for each in (earlier, config))
    if before == now:
        return ""
    warmup_steps = in_steps(config.schedule, "warmup", steps_per_epoch)

    def rate(step: int, *, total_steps: int) -> float:
        schedule = make_schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)
        return float(np.asarray(schedule(step)))

    begin = f"length: {now:,} steps instead of {before:,}; the {config.schedule.name} schedule"
    if all(rate(step, total_steps=before) == rate(step, total_steps=now) for step in (start, before - 1)):
        return f"{begin} goes on, learning rate {rate(start, total_steps=now):.3g}"
    return (
        f"{begin} is now that of the new length:\n"
        f"  the learning rate goes from {rate(start - 1, total_steps=before):.3g} to "
        f"{rate(start, total_steps=now):.3g} at step {start:,}"
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config by dotted key, as JSON stores it, with lists for tuples.

    `resolutions_px` is sorted, because its order changes no update.
    """
    flat: dict[str, Any] = flatten_dict(json.loads(json.dumps(config)), sep=".")
    return flat | {key: sorted(flat[key]) for key in ("resolutions_px",) if key in flat}
