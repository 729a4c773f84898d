"""Sends the metrics of a run to an experiment tracker, Weights & Biases or trackio, if `config.tracker` names one.

Both packages have the same three calls: init, log and finish. A tracker that fails is left out from then on, and the
training goes on, because metrics.jsonl has everything.
"""

import contextlib
import importlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.config import ConfigDict, flatten
from mlpmixer_flax.faults import first_line
from mlpmixer_flax.reading import read_object

# config.tracker, if it is not "" -> function that returns the arguments of its `init` that choose a run, from the name of the run
TRACKERS = {
    "trackio": lambda name: {"name": name},
    "wandb": lambda name: {"name": name, "id": name},
}
_PROJECT = "mlpmixer-flax"
_FILE = "tracker.json"  # in the run directory: the tracker, and the name of the run in it


def forget_run(workdir: Path) -> None:
    """Removes the name of a run in the tracker, before another run begins in its directory."""
    (workdir / _FILE).unlink(missing_ok=True)


def check_tracker(name: str) -> None:
    """Raises UserError if the package of a tracker cannot be imported; "" is no tracker."""
    if not name:
        return
    try:
        module = importlib.import_module(name)
    except Exception as error:
        reason = first_line(error)
    else:
        if hasattr(module, "init"):
            return
        # wandb leaves a folder of its name in the current one.
        place = module.__file__ or next(iter(module.__path__))
        kind = "file" if module.__file__ else "folder"
        reason = f"{place} is a {kind} of that name, and not the package"
    raise UserError(
        f"tracker={name!r} cannot be imported ({reason}): run pip install {name}, or set --config.tracker= (empty)"
    )


class Tracker:
    """The run of a tracker, which continues if the run in `workdir` does. It does nothing after a call has failed.

    Only the first of several processes has one.

    Args:
      rows: those of metrics.jsonl so far. A run that continues from a checkpoint computes the last of them again, and
        they are not sent again, if this tracker has them.
    """

    def __init__(self, config: ConfigDict, workdir: Path, *, rows: list[dict[str, float]]):
        self._name, self._run = config.tracker, None
        file = workdir / _FILE
        stored = read_object(file)
        # Earlier versions did not store which tracker it is.
        has_rows = bool(stored) and stored.get("tracker", self._name) == self._name
        self._sent = {(row["step"], *sorted(row)) for row in rows if has_rows}
        with self._forgiving("cannot be started"):
            run = name if isinstance(name := stored.get("name"), str) else _new_name(workdir)
            self._run = importlib.import_module(config.tracker).init(
                project=_PROJECT, config=flatten(config), resume="allow", **TRACKERS[config.tracker](run)
            )
            with replacing(file) as new:
                new.write((json.dumps({"tracker": self._name, "name": run}) + "\n").encode())
            print(f"metrics also go to {config.tracker}: project {_PROJECT}, run {run}", flush=True)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends a row of metrics.jsonl."""
        if self._run is None or (step, *sorted({"step", *scalars})) in self._sent:
            return
        with self._forgiving("has failed"):
            self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Sends what is left."""
        if self._run is not None:
            with self._forgiving("cannot send the last metrics"):
                self._run.finish()

    @contextlib.contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._run = None
            print(
                f"{self._name} {what}, and gets no more metrics; the training goes on, with all of them in metrics.jsonl "
                f"({first_line(error)})",
                flush=True,
            )


def _new_name(workdir: Path) -> str:
    """Returns a name for a run in a tracker.

    It ends in random letters, because a tracker has many runs, of which two may have directories of the same name.
    """
    name = re.sub(r"[/\\#?%:]", "_", workdir.absolute().name)  # which wandb refuses
    return f"{name}-{secrets.token_hex(3)}"
