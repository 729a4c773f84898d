"""Kills trainings at random moments and starts them again: the end must be that of a run which was never killed.

    python benchmarks/reliability/kills.py --count=35              # ten minutes

The moments are spread evenly from the start of the process to its end. Compared are all bits of the last state, and all
rows of metrics.jsonl except the speed. Ends with status 1 if something differs. Results: docs/reliability.md
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import chex
import orbax.checkpoint as ocp

from mlpmixer_flax.training.report import TIMINGS

# Everything random is on.
SMALL = {
    "model.hidden_dim": 16,
    "model.num_blocks": 2,
    "model.dropout_rate": 0.1,
    "model.stochastic_depth_rate": 0.1,
    "augment.mixup_alpha": 0.5,
    "ema_decay": 0.9,
    "log_every_steps": 10,
    "total_steps": 200,
    "save_every_steps": 7,
    "eval_every_steps": 45,
}


def start(workdir: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlpmixer_flax.train", "--config=digits.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in SMALL.items()]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment
    )


def result(workdir: Path):
    """Returns the last state of a run, and its metrics without the speed."""
    step = max(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (workdir / "checkpoints" / str(step)).absolute()
        state = [checkpointer.restore(folder / part) for part in ("default", "weights")]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return state, [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, default=35, help="number of kills, each of its own run (default: 35)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another number kills at other moments (default: 0)"
    )
    options = parser.parse_args()
    rng, failed, begun = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, workdir, cache = Path(folder, "whole"), Path(folder, "killed"), Path(folder, "compiled")
        for _ in range(2):  # the second time without compiling, as all that follow
            shutil.rmtree(whole, ignore_errors=True)
            started = time.monotonic()
            assert start(whole, cache).wait() == 0
            seconds = time.monotonic() - started
        wanted = result(whole)
        for number in range(options.count):
            process = start(workdir, cache)
            moment = seconds * (number + rng.random()) / options.count
            time.sleep(moment)
            process.kill()
            process.wait()
            saved = (
                [name for name in os.listdir(workdir / "checkpoints") if name.isdecimal()]
                if (workdir / "checkpoints").exists()
                else []
            )
            begun += bool(saved)
            again = start(workdir, cache)
            out = again.communicate()[0].decode()
            try:
                assert again.returncode == 0, out
                found = result(workdir)
                chex.assert_trees_all_equal(found[0], wanted[0])
                assert found[1] == wanted[1], "other metrics"
            except AssertionError as error:
                failed += 1
                print(f"killed after {moment:.2f} s: {error}")
            shutil.rmtree(workdir)
            print(
                f"{number + 1} of {options.count}: killed after {moment:.2f} s, newest {max(map(int, saved), default=0)}",
                flush=True,
            )
    print(
        f"{options.count} kills within {seconds:.1f} s, {begun} of them after a first checkpoint: {failed} ended otherwise"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
