"""Writes the tables of config keys and of published weights in docs/, from the code that defines them.

    python tools/write_docs.py

Writes all of docs/configuration.md, and the part of docs/weights.md between two marks. tests/test_docs.py checks that
both pages are up to date.
"""

import argparse
import ast
import io
import re
import textwrap
import tokenize
from pathlib import Path
from typing import NamedTuple

from mlpmixer_flax import config
from mlpmixer_flax.weights.catalog import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
SIZES = "digits mnist nano4 folder tiny4 s8 s16 s32 b16 b32 l16 l32 h14".split()
MARKS = "<!-- published weights, written by tools/write_docs.py -->\n", "<!-- end of published weights -->\n"

CONFIGURATION = """\
# Configuration

<!-- tools/write_docs.py writes this page from mlpmixer_flax/config.py: edit that file, not this page. -->

A config file calls `get_config()` of [config.py](../mlpmixer_flax/config.py) and changes some values. This page lists all
keys with their defaults. On the command line, `--config.KEY=VALUE` changes any key. Write values as in this example:

```
python -m mlpmixer_flax.train --config=configs/mnist.py --config.optimizer.learning_rate=1e-3 \\
    --config.model.patches.size=4,4 --config.augment.flip=true
```

Nothing after "=" makes a list or a text empty: `--config.resolutions_px=`, `--config.init_from=`.

In Python, give the changes to `load_config`: `mlpmixer_flax.load_config("mnist.py", {{"optimizer.learning_rate": 1e-3}})`
([python.md](python.md)).

Most durations have two keys: one ends in `_steps` (completed updates), the other in `_epochs` (passes over the training
split). If the `_steps` key is above 0, it is used; otherwise the `_epochs` key is used.

Five keys are empty by default. While they are empty, they follow the weights of `init_from`. If there are no such
weights, or the weights do not say, they are
{left_open}.
{sections}
## Sizes

`config.model.update(mixer_b16_config)` in a config file sets these keys. The first five sizes are for images of 8 to 64 px. The
others are for 224 px: the sizes of the paper (Table 1), and S/8, which is published but is not in that table.

{sizes}
"""


class Comments(NamedTuple):
    """The source of a module and its comments, each by its line number."""

    source: str
    after_code: dict[int, str]
    headings: dict[int, str]  # on a line of their own, after an empty line


def read_comments(file: str) -> Comments:
    """Returns the source and comments of a file in mlpmixer_flax/."""
    source = (ROOT / "mlpmixer_flax" / file).read_text()
    lines = source.splitlines()
    after_code, headings = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            text = token.string.removeprefix("# ")
            if lines[row - 1][:column].strip():
                after_code[row] = text
            elif not lines[row - 2].strip():
                headings[row] = text
    return Comments(source, after_code, headings)


def find_assignments(source: str, name: str) -> dict[str, range]:
    """Returns the assignments in a function or class: target as written -> the lines of the statement."""
    (home,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    return {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): range(
            node.lineno, node.end_lineno + 1
        )
        for node in home.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
    }


def write_configuration() -> str:
    """Returns the text of docs/configuration.md."""
    base, model = read_comments("config.py"), read_comments("models.py")
    assigned = find_assignments(base.source, "get_config")
    fields = find_assignments(model.source, "MlpMixer")
    start = assigned["config"][0]

    def rank(key: str) -> tuple[int, int]:
        # One statement sets all sizes of the model: they come in the order of the fields of MlpMixer.
        rows = assigned.get(f"config.{key}", assigned["config.model"])
        return rows[0], fields[key.split(".")[1]][0] if key.startswith("model.") else 0

    def meaning(key: str) -> str:
        if f"config.{key}" in assigned:
            rows = assigned[f"config.{key}"]
            return next((base.after_code[row] for row in rows if row in base.after_code), "")
        return model.after_code.get(fields[key.split(".")[1]][0], "")

    values = config.flatten(config.get_config())
    sections: dict[str, list[str]] = {}
    for key in sorted(values, key=rank):
        above = [row for row in base.headings if start < row < rank(key)[0]]
        heading = base.headings[max(above)] if above else "Randomness"
        sections.setdefault(heading, []).append(f"| `{key}` | {as_typed(values[key])} | {meaning(key)} |")
    parts = []
    for heading, rows in sections.items():
        title, rest = re.fullmatch(r"(.*?)(?:[:;,] (.*))?", heading).groups()
        parts += ["", f"## {title}", ""]
        parts += [f"{rest[0].upper()}{rest[1:]}.", ""] if rest else []
        parts += ["| key | default | meaning |", "|---|---|---|", *rows]
    return CONFIGURATION.format(
        left_open=textwrap.fill(
            ", ".join(as_typed(value, f"{key}=") for key, value in config.LEFT_OPEN.items()), 118
        ),
        sections="\n".join([*parts, ""]),
        sizes=write_sizes(),
    )


def as_typed(value: object, name: str = "") -> str:
    """Returns a value in Markdown, as --config.KEY= accepts it, with `name` before it."""
    if isinstance(value, tuple) and value:
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{name}{value}`" if value != "" else "empty"


def write_sizes() -> str:
    """Returns the table of sizes."""
    keys = "patches.size hidden_dim num_blocks tokens_mlp_dim channels_mlp_dim".split()
    lines = [f"| size | {' | '.join(f'`model.{key}`' for key in keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name in SIZES:
        size = config.flatten(config.ConfigDict(getattr(config, f"mixer_{name}_config")))
        lines.append(f"| `mixer_{name}_config` | {' | '.join(as_typed(size[key]) for key in keys)} |")
    return "\n".join(lines)


def write_weights(page: str) -> str:
    """Returns the text of docs/weights.md, given as `page`, with a new table of published weights."""
    start, end = MARKS
    before, rest = page.split(start)
    _, after = rest.split(end)
    notes = list(dict.fromkeys(weights.note for weights in PUBLISHED.values() if weights.note))
    lines = [
        "| name | MiB | classes | GELU | mean, std | resized | top-1, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, weights in PUBLISHED.items():
        url = weights.url.replace("hf-hub:", "https://huggingface.co/")
        note = f" ({notes.index(weights.note) + 1})" if weights.note else ""
        mib = f"{weights.size_mib:.2f}" if weights.size_mib else ""
        lines.append(
            f"| [`{name}`]({url}) | {mib} | {weights.num_classes:,} | {weights.gelu} | "
            f"{weights.mean[0]:g}, {weights.std[0]:g} | {weights.interpolation} | {weights.top1}{note} |"
        )
    lines += ["", *(f"({number}) {note[0].upper()}{note[1:]}.  " for number, note in enumerate(notes, 1))]
    return "".join([before, start, "\n", "\n".join(lines), "\n\n", end, after])


def main() -> None:
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    (ROOT / "docs" / "configuration.md").write_text(write_configuration())
    weights = ROOT / "docs" / "weights.md"
    weights.write_text(write_weights(weights.read_text()))


if __name__ == "__main__":
    main()
