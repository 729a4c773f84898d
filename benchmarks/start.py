"""Measures how long a run of the digits takes to its first update, and to its end.

    python benchmarks/start.py

Starts `python -m mlpmixer_flax.train --config=digits.py` in turn: 6 steps with an empty folder of compiled programs, 6 steps
with a full one, and the whole run with a full one. The first two are timed from the start of the process to the line about the
first update, the last one to the end of the process. "data_wait" is the mean over the epochs of the whole run. Takes
two minutes on 2 CPU cores without other work. Results: docs/performance.md
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = [sys.executable, "-u", "-m", "mlpmixer_flax.train", "--config=digits.py"]
SHORT = ["--config.total_steps=6"]


def seconds(cache: Path, run: Path, options: Sequence[str], *, until: str) -> float:
    """Returns the time from the start of a run to the first line with a text; "" is the end of the process."""
    started = time.perf_counter()
    found = 0.0
    with subprocess.Popen(
        [*COMMAND, f"--workdir={run}", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MLPMIXER_CACHE": str(cache)},
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if until and until in line and not found:
                found = time.perf_counter() - started
    if process.returncode:
        raise SystemExit("the run has failed: its error is above")
    return found or time.perf_counter() - started


def data_wait(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(row["data_wait"] for row in rows if "data_wait" in row)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="default: %(default)s")
    turns = parser.parse_args().turns
    print(f"{'turn':<8}{'first, empty':>14}{'first, full':>14}{'end, full':>14}{'data_wait':>12}")
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as name:
            folder, update = Path(name), "in the first update"
            cache = folder / "cache"
            empty = seconds(cache, folder / "empty", SHORT, until=update)
            full = seconds(cache, folder / "full", SHORT, until=update)
            seconds(cache, folder / "fill", [], until="")  # compiles what 6 steps do not need
            end = seconds(cache, folder / "end", [], until="")
            wait = data_wait(folder / "end")
        print(f"{turn:<8}{empty:>12.1f} s{full:>12.1f} s{end:>12.1f} s{wait:>12.3f}", flush=True)


if __name__ == "__main__":
    main()
