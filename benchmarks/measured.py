"""Reads and writes measured.jsonl, the results of finished runs, and says which form of a row a result belongs to."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import ROWS, Row

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.config import CHANGE_NO_UPDATE, ConfigDict, flatten, get_config
from mlpmixer_flax.training.configfile import load_config

MEASURED = Path(__file__).resolve().parent / "measured.jsonl"

# What a run measured, a line of measured.jsonl: "row", "seed", "accuracy" and "first" in %, "minutes", "step" (the last),
# "hardware", "versions", "commit", "data", "date", and "form" of the row. A "note" may be added by hand.
Result = Mapping[str, Any]

# Keys that change no update, but decide when a run ends, or which of its scores is the result
_CHOOSE_SCORES = {"eval_every_epochs", "eval_every_steps", "best_by", "early_stopping_evals"}
CHANGE_NO_RESULT = tuple(key for key in CHANGE_NO_UPDATE if key not in _CHOOSE_SCORES)


def form_of(row: Row) -> str:
    """Returns a code of what decides the result of a row, besides the seed; it changes when the row changes."""
    if row.weights:
        return code({"weights": row.weights})
    return code(deciding(load_config(row.config, row.changes)))


def deciding(config: ConfigDict) -> dict[str, Any]:
    """Returns dotted key -> value of the values that decide the result of a run.

    Values of the base config are left out, so that a new key of the package makes no new form of any row.
    """
    base = flatten(get_config())
    return {
        key: value
        for key, value in flatten(config).items()
        if key not in CHANGE_NO_RESULT and value != base[key]
    }


def code(values: Mapping[str, Any]) -> str:
    """Returns a short code of values; other values have another one."""
    return f"{zlib.crc32(repr(sorted(values.items())).encode()):08x}"


def is_current(result: Result) -> bool:
    """Returns whether a result belongs to the present form of its row; one without a form counts as such."""
    row = ROWS.get(result["row"])
    return row is not None and result.get("form") in (None, form_of(row))


def read_measured() -> list[Result]:
    """Returns all results, in the order of the file; [] if it does not exist.

    Raises:
      UserError: the file, or one of its lines, cannot be read.
    """
    try:
        lines = MEASURED.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [_parse(line, number) for number, line in enumerate(lines, 1)]


def _parse(line: bytes, number: int) -> Result:
    needed = {"row", "seed", "accuracy", "first", "minutes", "hardware", "versions", "data", "date"}
    try:
        result = json.loads(line)
        if not isinstance(result, dict) or not needed <= result.keys():
            raise ValueError(f"it is not an object with {', '.join(sorted(needed))}")
        return result
    except ValueError as error:
        raise UserError(
            f"{MEASURED}, line {number} cannot be read ({error}): mend the line, or remove it"
        ) from None


def add(result: Result) -> list[Result]:
    """Adds a result to the file, in place of one of the same row and seed; returns all results.

    Raises:
      UserError: as `read_measured`.
    """
    others = [old for old in read_measured() if (old["row"], old["seed"]) != (result["row"], result["seed"])]
    order = {name: number for number, name in enumerate(ROWS)}
    results = sorted([*others, result], key=lambda each: (order.get(each["row"], -1), each["seed"]))
    with replacing(MEASURED) as file:
        file.write("".join(json.dumps(each) + "\n" for each in results).encode())
    return results
