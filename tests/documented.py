"""Commands of README.md and docs/, taken apart and run."""

import importlib
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commands_below(page: str, heading: str) -> list[str]:
    """The commands of the first block after a heading of docs/PAGE."""
    text = (ROOT / "docs" / page).read_text().partition(f"## {heading}\n")[2]
    return re.search(r"```\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", "").splitlines()


def words_of(command: str) -> tuple[str, list[str]]:
    """(program, its arguments) of python -m mlpmixer_flax.PROGRAM ..."""
    words = shlex.split(command.partition(" > ")[0])
    assert words[:2] == ["python", "-m"], command
    package, _, program = words[2].partition(".")
    assert package == "mlpmixer_flax", command
    return program, words[3:]


def run(program: str, arguments: list[str]) -> int:
    return importlib.import_module(f"mlpmixer_flax.{program}").main(arguments)
