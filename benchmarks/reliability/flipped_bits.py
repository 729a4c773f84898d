"""Flips single bits in the files of checkpoints: none may change weights or training without a word.

    python benchmarks/reliability/flipped_bits.py --count=372       # two minutes

Each flip is tried in two ways. `load` must refuse the checkpoint, or return the very same weights, because the flipped
bit is not used. Training must go on from the same state, or from the checkpoint before. Ends with status 1 if one did not.
Results: docs/reliability.md
"""

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import chex
import jax

from mlpmixer_flax import UserError, fit, load_config
from mlpmixer_flax.config import resolve
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.training.checkpoints import Checkpoints
from mlpmixer_flax.training.setup import make_setup

SMALL = {
    "model.hidden_dim": 16,
    "model.num_blocks": 2,
    "augment.mixup_alpha": 0.0,
    "ema_decay": 0.9,
    "total_steps": 20,
    "eval_every_steps": 10,
    "save_every_steps": 10,
}


def make_run(workdir: Path):
    """Trains a small run with checkpoints of steps 10 and 20; returns the shapes of its state."""
    config = load_config("digits.py", SMALL)
    with contextlib.redirect_stdout(io.StringIO()):
        fit(config, workdir)
        return make_setup(resolve(config, {})).like


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def same(a, b) -> bool:
    try:
        chex.assert_trees_all_equal(a, b)
    except AssertionError:
        return False
    return True


def try_loading(run: Path, weights) -> str:
    try:
        step, found = read_weights(run, "last")
    except UserError:
        return "refused"
    return "not used" if step == 20 and same(found, weights) else "CHANGED"


def try_training(run: Path, like, states) -> str:
    """Restores as training does; returns what became of the flipped checkpoint."""
    with contextlib.closing(Checkpoints(run, keep=2)) as checkpoints:
        step, state = checkpoints.restore(like)
    if not same(state, states[step]):
        return "CHANGED"
    return "not used" if step == 20 else "the one before is used"


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=372, help="number of flips (default: 372)")
    parser.add_argument("--seed", type=int, default=0, help="another number flips other bits (default: 0)")
    options = parser.parse_args()
    rng, loaded, trained = random.Random(options.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        original, copy = Path(folder, "run"), Path(folder, "copy")
        like = make_run(original)
        weights, states = read_weights(original, "last")[1], {}
        for step in (20, 10):
            shutil.copytree(original, copy)
            if step == 10:
                shutil.rmtree(copy / "checkpoints" / "20")
            with contextlib.closing(Checkpoints(copy, keep=2)) as checkpoints:
                states[step] = jax.device_get(checkpoints.restore(like)[1])
            shutil.rmtree(copy)
        files = sorted(file.relative_to(original) for file in (original / "checkpoints" / "20").rglob("*"))
        files = [file for file in files if (original / file).is_file() and (original / file).stat().st_size]
        for number in range(options.count):
            file = rng.choice(files)
            shutil.copytree(original, copy)
            flip(copy / file, rng)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                first, second = try_loading(copy, weights), try_training(copy, like, states)
            loaded[first] += 1
            trained[second] += 1
            if "CHANGED" in (first, second):
                print(f"flip {number} in {file}: load {first}, training {second}")
            shutil.rmtree(copy)
    for name, found in (("load", loaded), ("training", trained)):
        print(
            f"{name}: {options.count} flips: "
            + ", ".join(f"{count} {what}" for what, count in found.most_common())
        )
    return 1 if "CHANGED" in loaded | trained else 0


if __name__ == "__main__":
    sys.exit(main())
