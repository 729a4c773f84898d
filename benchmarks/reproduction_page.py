"""Writes docs/reproduction.md, published figures beside ours.

    python benchmarks/reproduction_page.py

The text follows from figures.py and measured.jsonl alone. `reproduce.py` adds
a result and writes the page; this command writes it again, after one of the two
files was changed by hand.
"""

if __name__ == "__main__":
    from mlpmixer_flax import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import ROWS, Row
from measured import Result, add, is_current, read_measured

from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reproduction.md"

HEAD = """\
# Published figures, beside ours

<!-- benchmarks/reproduce.py writes this page from benchmarks/figures.py and benchmarks/measured.jsonl: run it, do not edit -->

Each row is a figure that somebody published for an MLP-Mixer, and the run of ours that stands beside it. One command runs
a row, continues it exactly after any interruption, and writes its result into this page.

```
python benchmarks/reproduce.py
python benchmarks/reproduce.py mnist
python benchmarks/reproduce.py all --seeds=3
```

The first command shows which rows can run on your machine, how many hours a long one takes, and runs
nothing. `all` runs every row that your machine can run: its data and weights are there, and so is a GPU if the row needs one.

"Published" is the accuracy on the test split as its authors report it (ImageNet: the validation split). "Ours" is the mean of n
runs with different seeds, each at its end, of all test images. "Not yet" means that nothing was measured; the row then says
what was missing on our machine, or how long it takes. tests/test_reproduce_rows.py runs each of these rows on a small scale: a
few images in the same file layout, and small random weights where it needs weights. Minutes are the number of updates
times the median time of an update, without compilation and evaluation, if nothing else is said.
"""


def record(result: Result) -> None:
    """Adds a result to the file of all results, in place of one of the same row and seed, and writes the page."""
    write_page(add(result))


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
        ours = summarize(own) + ("" if own else f": {why_not(row)}")
        lines.append(f"| `{name}` | {row.task} | {published} | {ours} | {needs(row)} |")
        details.append(_details(name, row, own))
    return "\n".join([HEAD, *lines, "", _without_a_row(), "", *details])


def summarize(results: Sequence[Result]) -> str:
    """Returns the mean accuracy of the runs of one row and their number; "not yet" if there are none.

    Results of an earlier form of the row count only if there are no others.
    """
    if not results:
        return "not yet"
    current = [result for result in results if is_current(result)]
    scores = [result["accuracy"] for result in current or results]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 2 else ""
    return f"{statistics.mean(scores):.2f}{spread} (n = {len(scores)})" + (
        "" if current else ", earlier form"
    )


def why_not(row: Row) -> str:
    """Returns why a row is not measured yet: what our machine lacks, or how long the row takes there."""
    dataset, weights = needed(row)
    parts = [dataset == "imagenet2012" and "ImageNet", weights and "weights", row.gpu and "GPU"]
    if any(parts):
        return ", ".join(f"no {part}" for part in parts if part)
    time = f"needs about {row.hours:g} hours on 2 cores, and " if row.hours else ""
    return f"{time}was not run to its end"


def _without_a_row() -> str:
    """Returns a paragraph about the weights of timm that have no row."""
    timm = [name for name in PUBLISHED if name.startswith("hf-hub:timm/")]
    others = [name for name in timm if PUBLISHED[name].num_classes != 1000]
    classes = sorted({PUBLISHED[name].num_classes for name in others})
    return (
        f"timm publishes {len(timm)} weights of Mixers, and {len(timm) - len(others)} of them have a row. The others have no "
        f"accuracy on ImageNet until they are fine-tuned, because their heads have other classes "
        f"({' or '.join(f'{count:,}' for count in classes)}, not 1,000): {', '.join(f'`{name}`' for name in others)}."
    )


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
    lines.append(f"- Reported: {row.accuracy:g} %; {row.reported}")
    lines.append(f"- Ours: {_command(row)}")
    if row.remarks:
        lines.append(f"- Differences: {row.remarks}")
    lines += [_run_line(row, result) for result in results]
    return "\n".join([*lines, ""])


def _run_line(row: Row, result: Result) -> str:
    """Returns the line of one run: accuracy, time, machine, versions, and whether it is one of the present row."""
    data = f" on a {result['data']}" if result["data"] else ""
    first = f", {result['first']:.2f} % at the first evaluation" if row.first else ""
    minutes = f", {result['minutes']:.0f} minutes" if result["minutes"] else ""
    commit = f", commit {result['commit']}" if result.get("commit") else ""
    note = f"; {result['note']}" if result.get("note") else ""
    earlier = "" if is_current(result) else "; measured with an earlier form of this row"
    return (
        f"- Seed {result['seed']}: {result['accuracy']:.2f} %{data}{first}{minutes}; {result['hardware']}; "
        f"{result['versions']}{commit}; {result['date']}{note}{earlier}"
    )


def _command(row: Row) -> str:
    if row.weights:
        return f"`python -m mlpmixer_flax.evaluate --weights={row.weights} --dataset=imagenet2012 --split=validation`"
    changes = ", ".join(f"`{key}={as_text(value)}`" for key, value in row.changes.items())
    return f"[{row.config}](../configs/{row.config})" + (f" with {changes}" if changes else "")


def as_text(value: Any) -> str:
    """Returns the value of a config's key as a program takes it: "4,8", "true"."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> int:
    """Runs the program. Exit status: 0 done, 2 measured.jsonl cannot be read."""
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    return exit_status(lambda: write_page(read_measured()))


if __name__ == "__main__":
    leave(main())
