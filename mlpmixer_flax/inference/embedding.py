"""Features of many images as a table in a file, and the most similar images by them.

A table is a dict: name of a column -> array with one row per image. Its columns are `file` str (n,), for files and folders;
`label` int32 (n,) and `class_name` str (n,), for a split; and `features` float32 (n, hidden_dim), the input of the head. If
images may have several labels, `label` is uint8 (n, classes), 1 for each label, and `class_name` has "|" between the names.
"""

import contextlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.data.tables import SEPARATOR
from mlpmixer_flax.dataloader import Examples, TestBatches, TrainBatches, iterate
from mlpmixer_flax.inference.forward import concatenate, forward, on_all_devices, rows_per_batch
from mlpmixer_flax.inference.model import Model

Table = dict[str, np.ndarray]


def embed_files(model: Model, files: Sequence[str], *, batch_size: int = 64) -> tuple[Table, list[str]]:
    """Returns the table of all files that can be used, in their order, and a sentence per file that cannot.

    Raises:
      UserError: no file can be used; the message is that of the first one.
    """
    rows = model.features_each(files, batch_size=batch_size)
    bar = tqdm(rows, "computing features", len(files), unit="img", delay=2, leave=False, disable=None)
    found = list(zip(files, bar, strict=True))
    flaws = [row for _, row in found if isinstance(row, str)]
    if len(flaws) == len(found):
        raise UserError(flaws[0])
    used, features = zip(*((file, row) for file, row in found if not isinstance(row, str)), strict=True)
    return {"file": np.array(used), "features": np.stack(features)}, flaws


def features_of_split(
    model: Model, examples: Examples, *, per_class: int = 0, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pooled features, float32 (n, hidden_dim), and the labels of the images of a split, as `Examples.read` has them.

    With `per_class=0` these are all images, in order; else images with one label each, in random order until every
    class has `per_class` of them, or all images if a class has fewer. `examples` come from `Model.open`.
    """
    batch_size = rows_per_batch(batch_size)
    if per_class:
        batches = TrainBatches(examples, batch_size=batch_size, seed=0)
    else:
        batches = TestBatches(examples, batch_size=batch_size)
    pooled = model.features_of("pooled", cropped=examples.cropped)

    def function(params, batch):
        return {**pooled(params, batch), "label": batch["label"]}

    parts, counts = [], np.zeros(examples.num_classes, int)
    num_batches = -(-len(examples) // batch_size)
    with contextlib.closing(iterate(batches, 0, num_batches)) as stream:
        bar = tqdm(stream, "computing features", num_batches, delay=2, leave=False, disable=None)
        for part in forward(on_all_devices(function), model.params, bar):
            parts.append(part)
            if per_class:
                counts += np.bincount(part["label"], minlength=len(counts))
                if counts.min() >= per_class:
                    break
    rows = concatenate(parts)
    # More rows than the split has belong to the next epoch.
    return rows["features"][: len(examples)], rows["label"][: len(examples)]


def embed_split(model: Model, examples: Examples, *, batch_size: int = 64) -> Table:
    """Returns the table of a split from `Model.open`, in its order."""
    features, labels = features_of_split(model, examples, batch_size=batch_size)
    files = {} if examples.files is None else {"file": np.array(examples.files)}
    names = np.array(examples.class_names)
    if examples.multi_label:
        named = np.array([SEPARATOR.join(names[row > 0]) for row in labels])
    else:
        named = names[labels]
    return {**files, "label": labels, "class_name": named, "features": features}


# --- files


def _write_npz(file: BinaryIO, table: Table) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # not np.savez: it cannot write an array called "file"
        for name, values in table.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _write_parquet(file: BinaryIO, table: Table) -> None:
    import pyarrow
    import pyarrow.parquet

    def column(values: np.ndarray) -> pyarrow.Array:
        if values.ndim == 2:
            return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])
        if values.dtype.kind != "U":
            return pyarrow.array(values)
        # Names of files may have bytes that are not text, which Parquet does not allow.
        texts = (text.encode(errors="backslashreplace").decode() for text in values.tolist())
        return pyarrow.array(texts, pyarrow.string())

    columns = {name: column(values) for name, values in table.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


# Suffix of the file -> function that writes a table
WRITERS: dict[str, Callable[[BinaryIO, Table], None]] = {".npz": _write_npz, ".parquet": _write_parquet}


def check_format(path: Path) -> None:
    """Raises UserError if a table cannot be written to a file of this name: call it before the work."""
    if path.suffix not in WRITERS:
        raise UserError(f"{path.name!r} has no format: give a name that ends in {' or '.join(WRITERS)}")


def write_table(path: Path, table: Table) -> None:
    """Writes a table to a file, in the format of its suffix.

    Raises:
      UserError: as `check_format`, or the file cannot be written.
    """
    check_format(path)
    with replacing(path) as file:
        WRITERS[path.suffix](file, table)


# --- similar images


def nearest(
    query: np.ndarray, features: np.ndarray, count: int, *, leave_out: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of `features` that are most similar to `query`, the most similar first, and their similarity.

    It is the cosine similarity, from -1 to 1: float (k,), where k is `count`, or less if there are fewer rows.

    Args:
      query: float (d,).
      features: float (n, d).
      leave_out: rows that are not to be found.
    """
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    similarity = features @ query / np.maximum(lengths, np.finfo(np.float32).tiny)
    order = np.argsort(-similarity, kind="stable")
    best = order[~np.isin(order, leave_out)][:count]
    return best, similarity[best]
