"""Measures how much pre-training on five classes of CIFAR-10 helps a small Mixer to learn the other five.

    python benchmarks/transfer.py --workdir=FOLDER

Pre-trains mixer_nano4 (0.67 M parameters) on classes 0 to 4, 25,000 images of 32 px, for 15 epochs. Then trains on
classes 5 to 9 with 200 images per class and three seeds, once from the pre-trained weights and once from random weights.
This is done at 32 px, and at 64 px, where the token-mixing MLPs start as four copies (Appendix C of the paper). Both
starts have the same data, steps and augmentation; each has its own learning rate. At the end of each run, the model is
scored on the 5,000 test images of classes 5 to 9.
Takes about two hours on 2 CPU cores. Finished runs in FOLDER are not run again.
Results: docs/weights.md
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from mlpmixer_flax import fit, load_config
from mlpmixer_flax.data.tfds import load_builder
from mlpmixer_flax.ending import exit_status, leave

# name -> (classes of CIFAR-10, training images per class)
DATASETS = {"cifar10_source": (range(0, 5), 5_000), "cifar10_target": (range(5, 10), 200)}
SEEDS = (0, 1, 2)
# (side of the images in px, width of the token-mixing MLP, passes over the 1,000 training images)
BUDGETS = [(32, 128, 20), (64, 4 * 128, 12), (32, 128, 60)]
STARTS = {"scratch": 2e-3, "fine-tuned": 1e-3}  # start -> learning rate of AdamW


def write_dataset(name: str, data_dir: Path) -> None:
    """Writes a TFDS dataset with some classes of CIFAR-10; the files of the images stay the same, byte for byte."""
    classes, per_class = DATASETS[name]
    cifar10 = load_builder("cifar10", "")
    names = cifar10.info.features["label"].names
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=[names[label] for label in classes]),
    }

    class Subset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples("train", per_class),
                "test": self._generate_examples("test", 1_000),
            }

        def _generate_examples(self, split, limit):
            source = cifar10.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            left = dict.fromkeys(classes, limit)
            for index, record in enumerate(tqdm(source, f"{name} {split}", leave=False)):
                label = int(record["label"])
                if left.get(label):
                    left[label] -= 1
                    yield index, {"image": record["image"], "label": classes.index(label)}

    Subset.name = name
    Subset(data_dir=data_dir, file_format="array_record").download_and_prepare()


def run(workdir: Path, dataset: str, data_dir: Path, **changes: Any) -> float:
    """Returns the test accuracy at the end of a run; a finished run in `workdir` is not trained again."""
    values = {
        "dataset": dataset,
        "data_dir": str(data_dir),
        "accumulation_steps": 4,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-3,
        "eval_every_epochs": 0.0,
        "save_every_epochs": 0.0,
        **changes,
    }
    return fit(load_config("nano_cifar10.py", values), workdir)["test/accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="directory for data and runs; takes 150 MB"
    )
    workdir = parser.parse_args().workdir
    for name in DATASETS:
        write_dataset(name, workdir)
    pretrained = workdir / "pretrained"
    accuracy = run(pretrained, "cifar10_source", workdir, total_epochs=15.0)
    print(f"pre-trained: {accuracy:.2%} on the 5,000 test images of its own classes")

    lines = []
    for size_px, tokens_mlp_dim, epochs in BUDGETS:
        for start, learning_rate in STARTS.items():
            scores = [
                100
                * run(
                    workdir / f"{start}-{size_px}px-{epochs}epochs-seed{seed}",
                    "cifar10_target",
                    workdir,
                    seed=seed,
                    init_from=str(pretrained) if start == "fine-tuned" else "",
                    batch_size=64,
                    total_epochs=float(epochs),
                    **{
                        "preprocess.image_size_px": size_px,
                        "model.tokens_mlp_dim": tokens_mlp_dim,
                        "optimizer.learning_rate": learning_rate,
                    },
                )
                for seed in SEEDS
            ]
            each = ", ".join(f"{score:.2f}" for score in scores)
            lines.append(
                f"| {size_px} px, {epochs} epochs | {start} | {statistics.mean(scores):.2f} "
                f"± {statistics.stdev(scores):.2f} | {each} |"
            )
    print("| size | start | mean ± std of 3 seeds, % | each |", "|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    leave(exit_status(main))
