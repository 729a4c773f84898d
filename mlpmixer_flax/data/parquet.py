"""Reads columns of a Parquet file; a small file that stands for a large table takes little memory."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow

_VALUE_BYTES = 16  # that a value takes at least, as a number in Arrow and a reference in Python


def read_columns(
    content: bytes, wanted: Collection[str], *, most_bytes: int
) -> tuple[list[str], dict[str, list[Any]]]:
    """Returns the names of all columns, and the values of the wanted ones by name.

    A value that a file has once may be in thousands of rows. So values are counted before they are read, a column of
    texts is read as its different texts and their numbers, and other columns are measured before they become lists.

    Raises:
      ValueError: the values would take more than `most_bytes`.
      Exception: the file is damaged; pyarrow raises exceptions of many classes.
    """
    import pyarrow  # here, because few tables are Parquet, and importing it takes a while
    import pyarrow.parquet

    def check(size: int) -> None:
        if size > most_bytes:
            raise ValueError(f"its content has more than {most_bytes:,} bytes")

    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    names = list(file.schema_arrow.names)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    check(sum(group.total_byte_size for group in groups))  # uncompressed
    # The number of values in lists is known only to `group.column`, with which pyarrow ends the process for some damage.
    rows, texts, row_bytes = file.metadata.num_rows, [], 0
    for leaf in map(file.schema.column, range(file.metadata.num_columns)):
        if leaf.path in wanted:
            row_bytes += max(leaf.length, _VALUE_BYTES)
            if leaf.physical_type == "BYTE_ARRAY":
                texts.append(leaf.path)
    check(rows * row_bytes)
    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content), read_dictionary=texts)
    table = file.read(columns=[name for name in names if name in wanted])
    check(table.nbytes)
    return names, {name: _values(table.column(name)) for name in table.column_names}


def _values(column: "pyarrow.ChunkedArray") -> list[Any]:
    """Returns the values of a column; rows with the same text share one object."""
    import pyarrow

    values = []
    for chunk in column.chunks:
        if isinstance(chunk, pyarrow.DictionaryArray):
            # The last one is for rows without a text.
            texts = np.array([*chunk.dictionary.to_pylist(), None], object)
            numbers = chunk.indices.cast("int64").fill_null(len(texts) - 1)
            values += texts[numbers.to_numpy()].tolist()
        else:
            values += chunk.to_pylist()
    return values
