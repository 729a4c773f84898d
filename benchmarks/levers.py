"""Measures what single changes give to a small Mixer on CIFAR-10: augmentation, regularization, optimizers, patch size.

    python benchmarks/levers.py --workdir=FOLDER

The model is a very small nano Mixer: patches of 4 px, 3 blocks, 48 channels, 44,170 parameters. It trains on 2,500 images,
train[:5%], for 20 epochs in batches of 64 with AdamW, with the other values of configs/nano_cifar10.py. It has few images for
its size, as larger models have with all 50,000. Each run changes one thing of this base; such a change is called a
lever here.

Levers are compared on images held out from training, train[90%:]. The test split is scored too, and decides nothing. Each
score is also given for the mean of the logits of an image and its mirror image ("flip"). At the end, the best value of each
lever that gains more than twice the standard deviation of the base is used together with the others, also for three times
as many epochs.

All levers run with the first seed before any runs with the second. A run takes about a minute of processor time (SAM twice,
patches of 2 px four times as much). FOLDER/table.md is written after each run. Finished runs in FOLDER are not run again, and
an interrupted one continues. Results: docs/recipes.md
"""

if __name__ == "__main__":
    from mlpmixer_flax import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import dataclasses
import json
import re
import statistics
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpmixer_flax import fit, load_config
from mlpmixer_flax.atomic import replacing, write_json
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.scores import measure, open_split, score_images

Changes = Mapping[str, Any]  # key of the config, dotted -> value
Scores = Mapping[str, float]  # name of a column -> accuracy in %; {} if the run diverged

EPOCHS = 20.0
BASE = {
    "model.hidden_dim": 48,
    "model.num_blocks": 3,
    "model.tokens_mlp_dim": 32,
    "model.channels_mlp_dim": 96,
    "train_split": "train[:5%]",
    "test_split": "train[90%:]",
    "batch_size": 64,
    "accumulation_steps": 1,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "total_epochs": EPOCHS,
    "eval_every_epochs": 0.0,
    "save_every_epochs": 5.0,
    "keep_checkpoints": 1,
}
SPLITS = {"held out": "train[90%:]", "test": "test"}
COLUMNS = [name + flip for name in SPLITS for flip in ("", ", flip")]
# lever -> its values, each with what it changes
LEVERS: dict[str, dict[str, Changes]] = {
    "RandAugment": {
        f"{layers} layer{'s' * (layers > 1)}, magnitude 6": {
            "augment.randaugment_layers": layers,
            "augment.randaugment_magnitude": 6.0,
        }
        for layers in (1, 2)
    },
    "CutMix": {"for half of the images": {"augment.cutmix_alpha": 1.0, "augment.mix_probability": 0.5}},
    "mixup": {"alpha 0.2": {"augment.mixup_alpha": 0.2}},
    "random erasing": {"for a quarter of the images": {"augment.erase_probability": 0.25}},
    "label smoothing": {"0.1": {"augment.label_smoothing": 0.1}},
    "stochastic depth": {"0.1": {"model.stochastic_depth_rate": 0.1}},
    "EMA": {"0.99": {"ema_decay": 0.99}},
    "SAM": {"rho 0.05": {"optimizer.sam_rho": 0.05}},
    "weight decay": {"0.2": {"optimizer.weight_decay": 0.2}},
    "learning rate": {f"{rate:g}": {"optimizer.learning_rate": rate} for rate in (4e-3, 8e-3)},
    "Muon": {
        f"learning rate {rate:g}": {
            "optimizer.name": "muon",
            "optimizer.momentum": 0.95,
            "optimizer.learning_rate": rate,
        }
        for rate in (2e-3, 4e-3, 8e-3)
    },
}
# They change the work of an update several times, or are on in the base, so they are never part of "together".
ALONE: dict[str, Changes] = {
    "no crop, no mirror images": {"augment.flip": False, "augment.crop_padding_px": 0},
    "patches of 8 px": {"model.patches.size": (8, 8)},
    "patches of 2 px": {"model.patches.size": (2, 2)},
    "three times the epochs": {"total_epochs": 3 * EPOCHS},
}


def all_runs() -> dict[str, Changes]:
    """Returns name -> changes of all runs but those of several levers together."""
    values = {f"{lever}: {value}": changes for lever in LEVERS for value, changes in LEVERS[lever].items()}
    return {"base": {}, **values, **ALONE}


def run(workdir: Path, changes: Changes) -> Scores:
    """Returns the scores at the end of a run, by COLUMNS; a finished run in `workdir` is not trained again."""
    file = workdir / "levers.json"
    if not file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        scores = _train_and_score(workdir, changes)
        with replacing(file) as opened:
            write_json(opened, scores)
    return json.loads(file.read_text())


def _train_and_score(workdir: Path, changes: Changes) -> Scores:
    try:
        fit(load_config("nano_cifar10.py", {**BASE, **changes}), workdir / "run")
    except FloatingPointError:
        return {}
    scores, model = {}, load_run(workdir / "run")
    for name, split in SPLITS.items():
        examples, classes = open_split(model, "cifar10", split)
        for flip in (False, True):
            rows = score_images(
                dataclasses.replace(model, flip=flip), examples, classes=classes, batch_size=250
            )
            scores[name + ", flip" * flip] = 100 * measure(rows)["accuracy"]
    return scores


def together(found: Mapping[str, list[Scores]]) -> Changes:
    """Returns the changes of the best value of each lever that gains more than the noise of the base."""
    base = [scores["held out"] for scores in found["base"]]
    limit = statistics.mean(base) + 2 * (statistics.stdev(base) if len(base) > 1 else 0)
    chosen: dict[str, Any] = {}
    for lever, values in LEVERS.items():
        means = {value: mean(found[f"{lever}: {value}"], "held out") for value in values}
        best = max(means, key=lambda value: means[value])
        if means[best] > limit:
            chosen |= values[best]
    return chosen


def mean(runs: list[Scores], column: str) -> float:
    """Returns the mean of a column over seeds; 0 if any run diverged."""
    return statistics.mean(scores.get(column, 0) for scores in runs) if all(runs) else 0


def table(found: Mapping[str, list[Scores]]) -> str:
    """Returns a Markdown table with a row per run; the runs of different seeds are one row."""
    base = mean(found["base"], "held out")
    lines = [
        f"| change | gain | {' | '.join(COLUMNS)} | held out, each seed |",
        "|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name, runs in found.items():
        if not all(runs):
            failed = f"diverged with {sum(not scores for scores in runs)} of {len(runs)} seeds"
            lines.append(f"| {name} | {failed} |" + " |" * (len(COLUMNS) + 1))
            continue
        means = [f"{mean(runs, column):.2f}" for column in COLUMNS]
        each = ", ".join(f"{scores['held out']:.2f}" for scores in runs)
        gain = f"{mean(runs, 'held out') - base:+.2f}" if name != "base" else ""
        lines.append(f"| {name} | {gain} | {' | '.join(means)} | {each} |")
    return "\n".join(lines)


def measure_all(folder: Path, *, seeds: int) -> None:
    """Runs everything, and writes table.md after each run."""
    found: dict[str, list[Scores]] = {}

    def add(name: str, changes: Changes, *, seed: int) -> None:
        # The changes that are put together depend on the results of all other runs.
        digest = zlib.crc32(repr(sorted(changes.items())).encode())
        run_folder = folder / f"{re.sub('[ :,]+', '_', name)}-{digest:08x}-seed{seed}"
        found.setdefault(name, []).append(run(run_folder, {**changes, "seed": seed}))
        (folder / "table.md").write_text(table(found) + "\n")

    for seed in range(seeds):
        for name, changes in all_runs().items():
            add(name, changes, seed=seed)
    add("base", {}, seed=seeds)
    chosen = together(found)
    for seed in range(seeds):
        add("together", chosen, seed=seed)
        add("together, three times the epochs", {**chosen, "total_epochs": 3 * EPOCHS}, seed=seed)
    print(table(found), f"together: {dict(chosen)}", sep="\n\n")


def main() -> int:
    """Runs the program. Exit status: 0 done, 2 unusable input, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory for runs and table.md")
    parser.add_argument(
        "--seeds", type=int, default=2, help="runs of each lever (default: 2; of the base one more)"
    )
    arguments = parser.parse_args()
    return exit_status(lambda: measure_all(arguments.workdir, seeds=arguments.seeds))


if __name__ == "__main__":
    leave(main())
