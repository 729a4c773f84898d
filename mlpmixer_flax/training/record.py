"""Records of what data a run consists of, so that data which changed between two starts is noticed."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.data.listing import FileRecords
from mlpmixer_flax.data.tfds import TfdsRecords
from mlpmixer_flax.dataloader import Examples
from mlpmixer_flax.faults import pass_on
from mlpmixer_flax.reading import read_json
from mlpmixer_flax.remote import shown
from mlpmixer_flax.rundir import MULTI_LABEL
from mlpmixer_flax.text import shorten
from mlpmixer_flax.training.continuing import Change, another_config

FILE = "data.json"  # in the run directory
TEACHER = "teacher"  # in the record of a run with distillation: `Teacher.digest`
_MOST_FILES = 100_000  # of a split; longer lists are not stored, and changes are then only counted


def make_record(config: ConfigDict, train: Examples, test: Examples) -> dict[str, Any]:
    """Returns what identifies the data of a run, as plain data.

    For a folder or a table these are, for each split, the number of images, a hash of the names and sizes of the files
    (of a table also of the labels) in the order of the examples, and the files themselves if they are not too many.
    Names are relative, so a folder or table that was moved has the same record. For TFDS datasets they are name,
    version and number of examples. The content of a file that keeps its size is not compared.
    """
    kind = MULTI_LABEL if train.multi_label else config.dataset.partition(":")[0]
    splits = {name: _describe(each, kind) for name, each in {"train": train, "test": test}.items()}
    records = train.source.records
    return {"dataset": records.dataset if isinstance(records, TfdsRecords) else kind, **splits}


def _describe(examples: Examples, kind: str) -> dict[str, Any]:
    records = examples.source.records
    if not isinstance(records, FileRecords):
        return {"examples": len(examples)}
    digest, sizes = hashlib.blake2b(digest_size=16), {}
    for name, label, size in zip(records.files, records.labels, records.sizes or [], strict=True):
        digest.update(os.fsencode(name) + b"\0%d\0" % size)
        if kind != "folder":  # whose names have the labels
            digest.update(f"{label}\0".encode())
        sizes[name] = size
    record: dict[str, Any] = {"examples": len(examples), "hash": digest.hexdigest()}
    return record | ({"files": sizes} if len(sizes) <= _MOST_FILES else {})


def read_record(workdir: Path) -> dict[str, Any]:
    """Returns the record in a run directory, or {} if there is none; says so if it cannot be read."""
    file = workdir / FILE
    try:
        record = read_json(file)
        if isinstance(record, dict) and all(_is_split(record.get(split)) for split in ("train", "test")):
            return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        pass_on(error, file)
    print(f"{shown(file)} is damaged and is written again: whether the data has changed is not known")
    return {}


def _is_split(record: Any) -> bool:
    """Returns whether this is a record of a split, as `_describe` returns it."""
    return (
        isinstance(record, dict)
        and type(record.get("examples")) is int
        and isinstance(files := record.get("files", {}), dict)
        and all(type(size) is int for size in files.values())
    )


def check_data(
    workdir: Path,
    stored: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    moved: Sequence[Change] = (),
) -> None:
    """Checks that a run continues with the data, and the teacher, with which it began.

    Args:
      stored, record: from `read_record` and `make_record`; with TEACHER if there is one.
      moved: the changes of `continuing.MOVABLE`: of those keys that have another value now.

    Raises:
      UserError: data or teacher are not the same; or have another name and nothing was recorded.
    """
    if not stored:
        if moved:
            raise UserError(f"{another_config(workdir, moved)}: choose another --workdir")
        return
    name = shown(workdir)
    advice = f"start a new run from this one with --config.init_from={name} and another --workdir"
    if stored.get(TEACHER) != record.get(TEACHER):
        raise UserError(
            f"the teacher of the run in {name} has other weights than when the run began: restore the weights, or {advice}"
        )
    differences = _compare(stored, record)
    if differences:
        names = [change.now for change in moved if change.key == "dataset"]
        cause = f"{names[0]} does not have the data of the run in {name}" if names else ""
        raise UserError(
            f"{cause or f'the data of the run in {name} has changed since the run began'} "
            f"({'; '.join(differences)}), and that would change its length and the order of its images: restore the data, or "
            f"{advice}"
        )


def _compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what differs between two records, in words."""
    if before.get("dataset") != now["dataset"]:
        return [f"it was {shorten(str(before.get('dataset')), 120)}, is {now['dataset']}"]
    same_files = "the same images in another order" + ", or with other labels" * (now["dataset"] != "folder")
    differences = []
    for split in ("train", "test"):
        theirs, ours = before[split], now[split]
        if theirs == ours:
            continue
        name = {"train": "training", "test": "evaluation"}[split]
        if "files" not in theirs or "files" not in ours:
            counts = f"{theirs['examples']:,} images, now {ours['examples']:,}"
            same = theirs["examples"] == ours["examples"]
            differences.append(f"{name}: {'other images, or in another order' if same else counts}")
        else:
            differences.append(f"{name}: {_compare_files(theirs['files'], ours['files']) or same_files}")
    return differences


def _compare_files(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    changes = {
        "added": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed": [name for name in now if before.get(name, now[name]) != now[name]],
    }
    words = [
        f"{len(names):,} image{'s' * (len(names) > 1)} {change}, such as {min(names)!r}"
        for change, names in changes.items()
        if names
    ]
    return ", ".join(words)
