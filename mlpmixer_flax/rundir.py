"""Reads and writes run directories: the config and class names of a run, and which steps it has saved.

Training writes them; all later programs read them. `run_weights` reads the weights.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing, write_json
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.reading import read_json
from mlpmixer_flax.remote import fetch, shown, url_of

MARKER = (
    "_CHECKPOINT_METADATA"  # a file of each checkpoint; a remote checkpoint is complete if it has this file
)
MULTI_LABEL = "table with several labels an image"  # stands in data.json as "dataset" of such a table
_TOO_MANY = 2**31  # steps: they are counted with 32 bits
KEYS_OF_A_RUN = {"model", "preprocess", "ema_decay", "loss"}


def fetch_run(workdir: Path) -> Path:
    """Brings the copy of a remote run up to date, and returns its path; does nothing for other paths.

    Weights are copied when they are read. Of a folder that is no run, only the files in it are copied.
    """
    arrays = ("/weights/", "/default/")
    fetch(workdir, lambda names: [n for n in files_of_run(names) if not any(part in n for part in arrays)])
    if url_of(workdir):
        for step in saved_steps(workdir):  # one that the run has deleted since
            if not (workdir / "checkpoints" / str(step) / MARKER).exists():
                shutil.rmtree(workdir / "checkpoints" / str(step))
    return workdir


def files_of_run(names: Collection[str]) -> list[str]:
    """Returns, of the names of files in a run directory, those of the run itself and of complete checkpoints."""
    marker = re.compile(rf"checkpoints/\d+/{MARKER}")
    complete = tuple(name.removesuffix(MARKER) for name in names if marker.fullmatch(name))
    return [name for name in names if "/" not in name or name.startswith(complete)]


def is_run(workdir: Path) -> bool:
    """Returns whether a directory has a config.json of a run; another program's config.json is none."""
    with contextlib.suppress(UserError, OSError):
        return KEYS_OF_A_RUN <= read_config(workdir).keys()
    return False


def has_updates(workdir: Path) -> bool:
    """Returns whether a run has got so far that it has a checkpoint, or lines in metrics.jsonl."""
    metrics = workdir / "metrics.jsonl"
    return bool(saved_steps(workdir)) or (metrics.exists() and metrics.stat().st_size > 0)


def read_config(workdir: Path) -> dict[str, Any]:
    """Returns the config of a run as plain data, or {} if the directory has no config.json.

    Raises:
      UserError: config.json cannot be read.
    """
    file = workdir / "config.json"
    if not file.exists():
        return {}
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        pass_on(error, file)
        raise UserError(f"{shown(file)} cannot be read ({error}): choose another --workdir") from None
    if not isinstance(config, dict):
        raise UserError(f"{shown(file)} is not the config of a run: choose another --workdir")
    return config


def read_config_of_run(workdir: Path) -> dict[str, Any]:
    """Returns the config of a run as plain data.

    Raises:
      UserError: the directory has no config.json of a run, or it cannot be read.
    """
    config = read_config(workdir)
    if not KEYS_OF_A_RUN <= config.keys():
        raise UserError(
            f"no run in {shown(workdir)}: it has no config.json of a run; give the directory of a run"
        )
    return config


def read_class_names(workdir: Path) -> list[str]:
    """Returns the class names, in the order of the head's outputs.

    Raises:
      UserError: class_names.json does not exist or cannot be read.
    """
    file = workdir / "class_names.json"
    try:
        names = read_json(file)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it is not a list of names")
    except (OSError, ValueError) as error:
        pass_on(error, file)
        raise UserError(
            f"{shown(file)} cannot be read ({error}): the run directory is incomplete; choose another"
        ) from None
    return names


def is_multi_label(workdir: Path) -> bool:
    """Returns whether the images that a run was trained on have several labels each; False if data.json is damaged."""
    with contextlib.suppress(UserError, OSError, ValueError):
        data = read_json(workdir / "data.json")
        return isinstance(data, dict) and data.get("dataset") == MULTI_LABEL
    return False


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints, in ascending order.

    Raises:
      UserError: permission to read the directory is missing.
    """
    folder = workdir / "checkpoints"
    try:
        names = [name for name in os.listdir(folder) if name.isdecimal() and str(int(name)) == name]
        return sorted(int(name) for name in names if int(name) < _TOO_MANY and _has_files(folder / name))
    except OSError as error:  # there is no such directory
        pass_on(error)
        return []


def _has_files(folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # a run in training may have removed it
        return bool(os.listdir(folder))
    return False


def write_run(
    workdir: Path, config: dict[str, Any], *, class_names: list[str], data: dict[str, Any] | None = None
) -> None:
    """Creates the directory and writes config and class names, which later programs need besides the weights.

    `data` is what `training.record` needs to recognise the data again; None = nothing is written.

    Raises:
      UserError: they cannot be written.
    """
    make_folder(workdir)
    contents: dict[str, Any] = {"config": config, "class_names": class_names}
    if data is not None:
        contents["data"] = data
    for name, content in contents.items():
        with replacing(workdir / f"{name}.json") as file:
            write_json(file, content)
