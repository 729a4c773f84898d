"""Measures what Muon and a learning rate per layer bring to a small Mixer on CIFAR-10, each against AdamW alone.

    python benchmarks/optimizers.py muon --workdir=FOLDER
    python benchmarks/optimizers.py nano --workdir=FOLDER
    python benchmarks/optimizers.py layer_decay --workdir=FOLDER

The model of `muon` and `layer_decay` has 67,000 parameters: the sizes of mixer_digits, with patches of 8 px.

`muon` trains it from random weights for 800 updates of 128 images, with AdamW and with Muon, at several learning rates and
with two seeds. It is scored on the 10,000 test images.

`nano` trains configs/nano_cifar10.py, with 671,882 parameters, for 3 of its 100 epochs, with AdamW and with Muon, and with one
seed. It trains on nine tenths of the training images, and is scored on the other 5,000: the config is chosen by this.

`layer_decay` gives each layer a share of the learning rate of the next one. It pre-trains the model on classes 0 to 4 for
1,000 updates, and fine-tunes it on classes 5 to 9 with 200 images per class for 10 epochs, with several learning rates and
shares, and two seeds. It is scored on the 5,000 test images of these classes.

`muon` and `layer_decay` take half an hour on 2 CPU cores, `nano` as long. Finished runs in FOLDER are not run again. Results: docs/recipes.md
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optax
from transfer import DATASETS, write_dataset

from mlpmixer_flax import fit, load_config
from mlpmixer_flax.config import flatten, mixer_digits_config
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.training import setup
from mlpmixer_flax.training.optimizer import make_optimizer

SEEDS = (0, 1)


def run(workdir: Path, **changes: Any) -> float:
    """Returns the test accuracy at the end of a run, in %; a finished run in `workdir` is not trained again."""
    values = {
        "accumulation_steps": 1,
        **{f"model.{key}": value for key, value in flatten(mixer_digits_config).items()},
        "model.patches.size": (8, 8),
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-3,
        "eval_every_epochs": 0.0,
        "save_every_epochs": 0.0,
        **changes,
    }
    return 100 * fit(load_config("nano_cifar10.py", values), workdir)["test/accuracy"]


def muon(folder: Path) -> list[str]:
    """Returns a row per optimizer and learning rate."""
    tried = [(name, rate) for rate in (4e-3, 8e-3) for name in ("adamw", "muon")]
    common = {"total_steps": 800, "schedule.warmup_steps": 50, "optimizer.momentum": 0.95}

    def accuracy(name: str, rate: float, *, seed: int) -> float:
        values = {**common, "optimizer.name": name, "optimizer.learning_rate": rate}
        return run(folder / f"{name}-{rate}-seed{seed}", seed=seed, **values)

    return table(tried, accuracy)


def nano(folder: Path) -> list[str]:
    """Returns a row per optimizer and learning rate."""
    common = {
        "train_split": "train[:90%]",
        "test_split": "train[90%:]",
        "total_epochs": 3.0,
        "eval_every_epochs": 0.0,
        "optimizer.momentum": 0.95,
    }

    def accuracy(name: str, rate: float, *, seed: int) -> float:
        changes = {**common, "optimizer.name": name, "optimizer.learning_rate": rate, "seed": seed}
        scores = fit(load_config("nano_cifar10.py", changes), folder / f"{name}-{rate}-seed{seed}")
        return 100 * scores["validation/accuracy"]  # because the split is a part of train

    tried = [("adamw", 2e-3), ("muon", 8e-3), ("adamw", 4e-3), ("muon", 1.6e-2)]
    return table(tried, accuracy, seeds=SEEDS[:1])


def layer_decay(folder: Path) -> list[str]:
    """Returns a row per share and learning rate."""
    for name in DATASETS:
        write_dataset(name, folder)
    data = {"data_dir": str(folder)}
    run(folder / "pretrained", dataset="cifar10_source", total_steps=1000, **data)
    tried = [(decay, rate) for rate in (2e-3, 4e-3) for decay in (1.0, 0.8, 0.6)]
    common = {**data, "dataset": "cifar10_target", "batch_size": 64, "total_epochs": 10.0}
    common |= {"init_from": str(folder / "pretrained")}
    num_blocks = mixer_digits_config.num_blocks

    def accuracy(decay: float, rate: float, *, seed: int) -> float:
        values = {**common, "optimizer.learning_rate": rate}
        # The package has no such key, because of the results of this script.
        setup.make_optimizer = lambda config, schedule: optax.chain(
            make_optimizer(config, schedule), scale_by_layer(decay, num_blocks=num_blocks)
        )
        return run(folder / f"{decay}-{rate}-seed{seed}", seed=seed, **values)

    return table(tried, accuracy)


def scale_by_layer(decay: float, *, num_blocks: int) -> optax.GradientTransformation:
    """Returns a factor per layer: 1 for the head and the LayerNorm before it, `decay` for the last block, and so on."""
    factors = {f"MixerBlock_{i}": decay ** (num_blocks - i) for i in range(num_blocks)}
    factors |= {"stem": decay ** (num_blocks + 1), "pre_head_layer_norm": 1.0, "head": 1.0}

    def scale(updates, params=None):
        return {name: optax.tree.scale(factors[name], layer) for name, layer in updates.items()}

    return optax.stateless(scale)


def table(
    tried: Sequence[tuple[Any, float]], accuracy: Callable[..., float], *, seeds: Sequence[int] = SEEDS
) -> list[str]:
    """Returns a row per pair, with the mean over the seeds and each; all are run with the first seed first."""
    by_seed = [[accuracy(*pair, seed=seed) for pair in tried] for seed in seeds]
    lines = []
    for (first, rate), scores in zip(tried, zip(*by_seed, strict=True), strict=True):
        each = ", ".join(f"{score:.2f}" for score in scores)
        lines.append(f"| {first} | {rate:g} | {statistics.mean(scores):.2f} | {each} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("muon", "nano", "layer_decay"))
    parser.add_argument("--workdir", type=Path, required=True, help="directory for data and runs")
    arguments = parser.parse_args()
    part = {"muon": muon, "nano": nano, "layer_decay": layer_decay}[arguments.part]
    lines = part(arguments.workdir / arguments.part)
    print(
        f"| {'layer_decay' if part is layer_decay else 'optimizer'} | learning rate | mean, % | each seed |",
        "|---|---|---|---|",
        *lines,
        sep="\n",
    )


if __name__ == "__main__":
    leave(exit_status(main))
