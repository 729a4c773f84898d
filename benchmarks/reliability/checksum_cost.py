"""Measures what checksums cost beside a save and a load of Mixer-B/16 with its optimizer state.

    python benchmarks/reliability/checksum_cost.py                 # one minute, 2 GB of disk

Results: docs/reliability.md
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from mlpmixer_flax.checksums import check_files, write_checksums
from mlpmixer_flax.config import get_config, mixer_b16_config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.rundir import write_run
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.step import TrainState


def timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="saves and loads (default: 5)")
    repeat = parser.parse_args().repeat
    model = MlpMixer(num_classes=1000, **mixer_b16_config.to_dict())
    images = np.zeros((1, 224, 224, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    config = get_config().to_dict()
    save, write, load, check = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_run(run, config, class_names=[str(i) for i in range(1000)])
        with contextlib.closing(Checkpoints(run, keep=1)) as checkpoints:
            for step in range(1, repeat + 2):
                # The parameters and the two moments of Adam
                state = TrainState(jax.numpy.asarray(step), params, {"mu": params, "nu": params}, None)

                def whole(step=step, state=state):
                    checkpoints.save(step, state, None)
                    checkpoints.best()  # waits until everything is on disk

                save.append(timed(whole))
                newest = run / "checkpoints" / str(step)
                write.append(timed(write_checksums, newest))
                load.append(timed(read_weights, run, "last"))
                check.append(timed(check_files, newest, "weights"))
                files = [file.stat().st_size for file in newest.rglob("*") if file.is_file()]
    print(f"checkpoint of {sum(files) / 2**20:,.0f} MiB; medians of {repeat}, the first one left out")
    for name, all_of_it, part in (("save", save, write), ("load", load, check)):
        whole, sums = statistics.median(all_of_it[1:]), statistics.median(part[1:])
        spread = f"{min(all_of_it[1:]):.2f} to {max(all_of_it[1:]):.2f}"
        print(f"{name}: {whole:.2f} s ({spread}), of it checksums {sums:.3f} s, {sums / whole:.1%}")


if __name__ == "__main__":
    main()
