"""Writes docs/reproduction.md, published figures beside ours.

    python benchmarks/reproduction_page.py

The text follows from figures.py and measured.jsonl alone. `reproduce.py` adds a result and writes the page; this command
writes it again, after one of the two files was changed by hand.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import ROWS, Row

from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "measured.jsonl"
PAGE = ROOT / "docs" / "reproduction.md"

# What a run measured, a line of measured.jsonl: "row", "seed", "accuracy" and "first" in %, "minutes", "hardware",
# "versions", "data" and "date"
Result = Mapping[str, Any]

HEAD = """\
# Published figures, beside ours

<!-- benchmarks/reproduce.py writes this page from benchmarks/figures.py and benchmarks/measured.jsonl: run it, do not edit -->

Each row is a figure that somebody published for an MLP-Mixer, and the run of ours that stands beside it. One command runs
a row, continues it exactly after any interruption, and writes its result into this page:

```
python benchmarks/reproduce.py
python benchmarks/reproduce.py mnist
python benchmarks/reproduce.py all --seeds=3
```

The first command shows which rows can run on your machine, and runs nothing. `all` runs every row that your
machine can run: its data and weights are there, and so is a GPU if the row needs one.

"Published" is the accuracy on the test split as its authors report it (ImageNet: the validation split). "Ours" is the mean of n
runs with different seeds, each at its end, of all test images. "Not yet" means that nothing was measured: what the row needs, or
the time, was not there. tests/test_reproduce.py runs each of these rows on a small scale: a few images in the same file layout,
and small random weights where it needs weights. Minutes are those of the updates, without compilation and evaluation, if nothing else is said.
"""


def read_measured(file: Path = MEASURED) -> list[Result]:
    """Returns all results, in the order of the file; [] if it does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def record(result: Result) -> None:
    """Adds a result to the file of all results, in place of one of the same row and seed, and writes the page."""
    others = [old for old in read_measured() if (old["row"], old["seed"]) != (result["row"], result["seed"])]
    order = {name: number for number, name in enumerate(ROWS)}
    results = sorted([*others, result], key=lambda each: (order.get(each["row"], -1), each["seed"]))
    with replacing(MEASURED) as file:
        file.write("".join(json.dumps(each) + "\n" for each in results).encode())
    write_page(results)


def write_page(results: Sequence[Result]) -> None:
    with replacing(PAGE) as file:
        file.write(page(results).encode())


def page(results: Sequence[Result]) -> str:
    """Returns the text of docs/reproduction.md."""
    lines = ["| row | task | published, % | ours, % | needs |", "|---|---|---|---|---|"]
    details = []
    for name, row in ROWS.items():
        own = [result for result in results if result["row"] == name]
        published = f"{row.accuracy:g}" + (f" ({row.first:g} after one epoch)" if row.first else "")
        lines.append(f"| `{name}` | {row.task} | {published} | {summarize(own)} | {needs(row)} |")
        details.append(_details(name, row, own))
    return "\n".join([HEAD, *lines, "", *details])


def summarize(results: Sequence[Result]) -> str:
    """Returns the mean accuracy of the runs of one row and their number; "not yet" if there are none."""
    if not results:
        return "not yet"
    scores = [result["accuracy"] for result in results]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 2 else ""
    return f"{statistics.mean(scores):.2f}{spread} (n = {len(scores)})"


def needs(row: Row) -> str:
    """Returns what a row needs, in words: dataset, weights, device."""
    dataset, weights = needed(row)
    size = PUBLISHED[weights].size_mib if weights else None
    parts = [
        dataset,
        weights and f"`{weights}`" + (f" ({size:.0f} MiB)" if size else ""),
        row.gpu and "a GPU",
    ]
    return ", ".join(part for part in parts if part)


def needed(row: Row) -> tuple[str, str]:
    """Returns the names of the dataset and of the weights that a row needs; "" = no weights."""
    if row.weights:
        return "imagenet2012", row.weights
    config = load_config(row.config, row.changes)
    return config.dataset, config.init_from


def _details(name: str, row: Row, results: Sequence[Result]) -> str:
    """Returns the section of a row: source, what is reported, our command and each run."""
    lines = [f"## {name}", "", f"{row.task[0].upper()}{row.task[1:]}.", "", f"- Source: {row.source}"]
    if row.reported:
        lines.append(f"- Reported: {row.accuracy:g} %; {row.reported}")
    lines.append(f"- Ours: {_command(row)}")
    if row.remarks:
        lines.append(f"- Differences: {row.remarks}")
    for result in results:
        data = f" on a {result['data']}" if result["data"] else ""
        first = f", {result['first']:.2f} % at the first evaluation" if row.first else ""
        minutes = f", {result['minutes']:.0f} minutes" if result["minutes"] else ""
        lines.append(
            f"- Seed {result['seed']}: {result['accuracy']:.2f} %{data}{first}{minutes}; {result['hardware']}; "
            f"{result['versions']}; {result['date']}"
        )
    return "\n".join([*lines, ""])


def _command(row: Row) -> str:
    if row.weights:
        return f"`python -m mlpmixer_flax.evaluate --weights={row.weights}`"
    changes = ", ".join(f"`{key}={as_text(value)}`" for key, value in row.changes.items())
    return f"[{row.config}](../configs/{row.config})" + (f" with {changes}" if changes else "")


def as_text(value: Any) -> str:
    """Returns the value of a config's key as a program takes it: "4,8", "true"."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    write_page(read_measured())
