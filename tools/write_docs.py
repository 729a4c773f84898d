"""Writes what docs/ says of the config's keys and of the published weights, from the code that defines them.

    python tools/write_docs.py

docs/configuration.md is written whole, docs/weights.md between its marks; tests/test_docs.py compares.
"""

import ast
import io
import re
import textwrap
import tokenize
from pathlib import Path

from mlpmixer_flax import config
from mlpmixer_flax.weights.catalog import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
SIZES = "digits mnist nano4 tiny4 s8 s16 s32 b16 b32 l16 l32 h14".split()
MARKS = "<!-- published weights, written by tools/write_docs.py -->\n", "<!-- end of published weights -->\n"

CONFIGURATION = """\
# Configuration

<!-- Written by tools/write_docs.py from mlpmixer_flax/config.py; edit that. -->

A config file is a short diff over `get_config()` of [config.py](../mlpmixer_flax/config.py), whose keys and defaults
are these. On the command line any of them is `--config.KEY=VALUE`, a value written as below:

```
python -m mlpmixer_flax.train --config=configs/mnist.py --config.optimizer.learning_rate=1e-3 \\
    --config.model.patches.size=4,4 --config.augment.flip=true
```

A duration has a `_steps` key (completed updates) and an `_epochs` key (passes over the training split); `_steps` counts
where it is above 0. Four keys are left open and follow the weights of `init_from`; without any they are
{left_open}.
{sections}
## Sizes

`config.model.update(mixer_b16_config)` in a config file sets these keys. The first four sizes are for small images, the
others for 224 px: the paper's (Table 1), and S/8, which is published without standing there.

{sizes}
"""


def read_comments(file: str) -> tuple[str, dict[int, str], dict[int, str]]:
    """A module's source, the comments behind code and those that head a paragraph, by line."""
    source = (ROOT / "mlpmixer_flax" / file).read_text()
    lines = source.splitlines()
    behind, heading = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            text = token.string.removeprefix("# ")
            if lines[row - 1][:column].strip():
                behind[row] = text
            elif not lines[row - 2].strip():
                heading[row] = text
    return source, behind, heading


def find_assignments(source: str, name: str) -> dict[str, range]:
    """Of a function or class: target as it is written -> the lines of the statement that assigns it."""
    (home,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == name)
    return {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): range(
            node.lineno, node.end_lineno + 1
        )
        for node in home.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
    }


def write_configuration() -> str:
    """docs/configuration.md."""
    source, behind, headings = read_comments("config.py")
    assigned = find_assignments(source, "get_config")
    model_source, behind_field, _ = read_comments("models.py")
    fields = find_assignments(model_source, "MlpMixer")
    start = assigned["config"][0]

    def rank(key):
        # The sizes of the model, set at once, come in the order of its fields.
        rows = assigned.get(f"config.{key}", assigned["config.model"])
        return rows[0], fields[key.split(".")[1]][0] if key.startswith("model.") else 0

    def meaning(key):
        if f"config.{key}" in assigned:
            return next((behind[row] for row in assigned[f"config.{key}"] if row in behind), "")
        return behind_field.get(fields[key.split(".")[1]][0], "")

    values = config.flatten(config.get_config())
    sections: dict[str, list[str]] = {}
    for key in sorted(values, key=rank):
        above = [row for row in headings if start < row < rank(key)[0]]
        heading = headings[max(above)] if above else "Randomness"
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
    """A value as --config.KEY= takes it, as code."""
    if isinstance(value, tuple) and value:
        value = ",".join(map(str, value))
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{name}{value}`" if value != "" else "empty"


def write_sizes() -> str:
    keys = "patches.size hidden_dim num_blocks tokens_mlp_dim channels_mlp_dim".split()
    lines = [f"| size | {' | '.join(f'`model.{key}`' for key in keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name in SIZES:
        size = config.flatten(config.ConfigDict(getattr(config, f"mixer_{name}_config")))
        lines.append(f"| `mixer_{name}_config` | {' | '.join(as_typed(size[key]) for key in keys)} |")
    return "\n".join(lines)


def write_weights(page: str) -> str:
    """docs/weights.md with the table of published weights between its marks."""
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
    (ROOT / "docs" / "configuration.md").write_text(write_configuration())
    weights = ROOT / "docs" / "weights.md"
    weights.write_text(write_weights(weights.read_text()))


if __name__ == "__main__":
    main()
