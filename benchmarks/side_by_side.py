"""Compares speeds in turn: several processes, each with its own environment, take turns of a second on a quiet machine.

    python benchmarks/side_by_side.py --model=nano4 --kind=training --batch_size=32,128 \\
        --side="ours: python ours" \\
        --side="timm: /path/to/torch/venv/bin/python timm" \\
        --side="timm compiled: /path/to/torch/venv/bin/python timm-compiled"

A side is a name, a colon, variables of the environment if it needs any, a Python interpreter, and what it measures:
"ours" (with KEY=VALUE behind it to change the config), "timm" or "timm-compiled". Two releases of JAX are two sides with
the interpreters of two virtual environments. Other work on the machine slows all sides of a turn alike, so the ratios hold
where the speeds themselves do not: a line has the median speed of each side, and the median, lowest and highest ratio
of its turns to those of the first side. Results: docs/performance.md
"""

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlpmixer_flax import UserError, huge_pages

TURN_SECONDS = 1.0
LIBRARIES = ("ours", "timm", "timm-compiled")


@dataclass(frozen=True)
class Side:
    """One of the processes that are compared."""

    name: str
    variables: dict[str, str]
    command: list[str]  # interpreter and library, with changes of the config

    def start(self, model: str, kind: str, batch_size: int) -> "subprocess.Popen[str]":
        """Starts the process, which prepares itself and then waits."""
        interpreter, *words = self.command
        task = json.dumps({"words": words, "model": model, "kind": kind, "batch_size": batch_size})
        return subprocess.Popen(
            [interpreter, __file__, f"--serve={task}"],
            # All sides have the huge pages of our programs, unless their variables say otherwise.
            env={huge_pages.VARIABLE: huge_pages.VALUE, **os.environ, **self.variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def parse_side(text: str) -> Side:
    """Returns the side that an option describes."""
    name, _, rest = text.partition(":")
    words = shlex.split(rest)
    variables = {}
    while words and re.match(r"\w+=", words[0]):
        key, _, variables[key] = words.pop(0).partition("=")
    if len(words) < 2 or words[1] not in LIBRARIES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give NAME: [VARIABLE=VALUE ...] PYTHON LIBRARY, with one of {', '.join(LIBRARIES)}"
        )
    return Side(name.strip(), variables, words)


def prepare(words: Sequence[str], model: str, kind: str, batch_size: int) -> Callable[[int], object]:
    """Returns a function that runs what is measured n times."""
    library, *overrides = words
    if library == "ours":
        from mlpmixer_flax.benchmark import named_config
        from mlpmixer_flax.config import resolve
        from mlpmixer_flax.training.configfile import change_config
        from mlpmixer_flax.training.speed import prepare

        config = named_config(model)
        change_config(config, [f"--config.{override}" for override in overrides])
        return prepare(resolve(config, {}), kind, batch_size, num_classes=1000).run
    import timm_speed

    return timm_speed.prepare(model, kind, batch_size, compiled=library == "timm-compiled")


def serve(task: dict[str, Any]) -> None:
    """Runs as many calls as each line of the input says; answers with the seconds that they took."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not be taken for an answer
    os.dup2(2, 1)
    try:
        run = prepare(**task)
    except UserError as error:
        sys.exit(f"error: {error}")
    run(1)
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - started, file=answers, flush=True)


def ask(name: str, process: "subprocess.Popen[str]", calls: int) -> float:
    """Returns the seconds that a side needs for a number of calls; the process is stopped before and afterwards.

    Otherwise threads of libraries that wait busily would take the cores from the next side.

    Raises:
      SystemExit: the side has ended, because what it shall measure is wrong or cannot run.
    """
    assert process.stdin and process.stdout
    process.send_signal(signal.SIGCONT)
    try:
        print(calls, file=process.stdin, flush=True)
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    if not answer:
        raise SystemExit(f"side {name!r} has ended: its error is above")
    process.send_signal(signal.SIGSTOP)
    return float(answer)


def compare(
    sides: Sequence[Side], model: str, kind: str, batch_size: int, *, turns: int
) -> list[list[float]]:
    """Returns images per second of each turn, by side."""
    processes = [side.start(model, kind, batch_size) for side in sides]
    try:
        names = [side.name for side in sides]
        for name, process in zip(names, processes, strict=True):
            ask(name, process, 1)  # all are ready afterwards: nothing compiles any more
        ready = [ask(name, process, 1) for name, process in zip(names, processes, strict=True)]
        calls = [max(1, round(TURN_SECONDS / seconds)) for seconds in ready]
        speeds: list[list[float]] = [[] for _ in sides]
        for _ in range(turns):
            for speed, name, process, n in zip(speeds, names, processes, calls, strict=True):
                speed.append(batch_size * n / ask(name, process, n))
        return speeds
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    if sys.argv[1:] and sys.argv[1].startswith("--serve="):
        serve(json.loads(sys.argv[1].removeprefix("--serve=")))
        return
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--side",
        type=parse_side,
        action="append",
        required=True,
        help="see above; the first one is compared with",
    )
    parser.add_argument(
        "--model",
        default="nano4",
        metavar="NAMES",
        help="names of mlpmixer_flax.benchmark, with commas between",
    )
    parser.add_argument("--kind", default="training,inference", metavar="KINDS", help="default: %(default)s")
    parser.add_argument("--batch_size", default="32", metavar="N,...", help="default: %(default)s")
    parser.add_argument(
        "--turns",
        type=int,
        default=12,
        metavar="N",
        help="turns of a second of each side (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all speeds to this file")
    arguments = parser.parse_args()
    print(f"{'':<30}{'images/s':>9}   ratio to {arguments.side[0].name!r}: median (lowest to highest)")
    rows = []
    for model in arguments.model.split(","):
        for kind in arguments.kind.split(","):
            for batch_size in map(int, arguments.batch_size.split(",")):
                print(f"{model}, {kind}, batch {batch_size}")
                speeds = compare(arguments.side, model, kind, batch_size, turns=arguments.turns)
                for side, speed in zip(arguments.side, speeds, strict=True):
                    ratios = sorted(a / b for a, b in zip(speed, speeds[0], strict=True))
                    median = statistics.median(speed)
                    print(
                        f"  {side.name:<28}{median:>9,.{0 if median >= 100 else 1}f}   "
                        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                        flush=True,
                    )
                    rows.append(
                        {
                            "side": side.name,
                            "model": model,
                            "kind": kind,
                            "batch_size": batch_size,
                            "speeds": speed,
                        }
                    )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
