"""A row of figures.py with one seed, as the user wants it run: its config, its run directory, and what it needs."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
from figures import ROWS, Row
from measured import CHANGE_NO_RESULT, code, deciding, form_of
from reproduction_page import as_text, needed

from mlpmixer_flax import UserError, get_dataset_info
from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.download import cache_file
from mlpmixer_flax.weights.source import find

IMAGENET = {"train": 1_281_167, "validation": 50_000}  # images of its splits
IMAGENET_CLASSES = 1_000


@dataclass(frozen=True)
class Task:
    """A row with one seed, and what the user asked for."""

    name: str  # of the row
    seed: int
    workdir: Path
    imagenet: str  # the dataset that stands for "imagenet2012"
    overrides: tuple[str, ...]  # --config.KEY=VALUE

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @cached_property
    def trial(self) -> str:
        """Why the result is not one of the row: what is changed, in words; "" if it is one of the row.

        Raises:
          UserError: the dataset cannot be opened.
        """
        keys = [override.partition("=")[0].removeprefix("--config.") for override in self.overrides]
        if changed := [key for key in keys if key not in CHANGE_NO_RESULT]:
            return f"{', '.join(changed)} changed"
        if needed(self.row)[0] != "imagenet2012":
            return ""
        for split in ["validation"] if self.row.weights else IMAGENET:
            info = get_dataset_info(self.dataset, split, data_dir=self.data_dir)
            found = info["num_examples"], info["num_classes"]
            if found != (IMAGENET[split], IMAGENET_CLASSES):
                return (
                    f"the {split} split of {self.dataset} has {found[0]:,} images of {found[1]:,} classes, "
                    f"not {IMAGENET[split]:,} of {IMAGENET_CLASSES:,}"
                )
        return ""

    @cached_property
    def form(self) -> str:
        """The code of what decides the result: of the row, or of the trial."""
        if not self.trial:
            return form_of(self.row)
        if self.row.weights:
            return code({"weights": self.row.weights, "dataset": self.dataset})
        return code(deciding(self.config))

    @property
    def run(self) -> Path:
        """The run directory; trials that differ have one each."""
        return self.workdir / f"{self.name}-seed{self.seed}{f'-trial-{self.form}' if self.trial else ''}"

    @property
    def changes(self) -> list[str]:
        """The arguments that change the config of the row, in the order in which they count."""
        values = {**self.row.changes, "seed": self.seed}
        if needed(self.row)[0] == "imagenet2012":
            values["dataset"] = self.imagenet
        return [*(f"--config.{key}={as_text(value)}" for key, value in values.items()), *self.overrides]

    @cached_property
    def config(self) -> ConfigDict:
        """The config of a row that trains."""
        return load_config(self.row.config, self.changes)

    @property
    def dataset(self) -> str:
        return self.imagenet if self.row.weights else self.config.dataset

    @property
    def data_dir(self) -> str:
        return "" if self.row.weights else self.config.data_dir

    @property
    def weights(self) -> str:
        """The name of the weights that the task evaluates or starts from; "" = none."""
        return self.row.weights or self.config.init_from


def open_dataset(task: Task) -> None:
    """Raises UserError if the dataset of a task cannot be opened."""
    split = "validation" if task.row.weights else task.config.train_split
    remedy = ""
    if task.dataset == "imagenet2012":
        remedy = ", or give --imagenet=folder:PATH of a folder with train/ and val/"
    folder = task.data_dir
    if folder and "://" not in folder and not os.path.isdir(os.path.expanduser(folder)):
        raise UserError(
            f"{folder} does not exist: give a --config.data_dir that contains {task.dataset}{remedy}"
        )
    try:
        get_dataset_info(task.dataset, split, data_dir=folder)
    except UserError as error:
        raise UserError(f"{error}{remedy}") from None


def missing(task: Task) -> list[str]:
    """Returns what a task needs and this machine does not have, in words."""
    absent = []
    try:
        open_dataset(task)
    except UserError:
        absent.append(task.dataset)
    if task.weights in PUBLISHED and not is_cached(task.weights):
        absent.append("weights")
    if task.row.gpu and jax.default_backend() == "cpu":
        absent.append("GPU")
    return absent


def is_cached(weights: str) -> bool:
    """Returns whether published weights are in the cache; uses no network."""
    url = PUBLISHED[weights].url
    if not url.startswith("hf-hub:"):
        return cache_file(url).is_file()
    try:
        import huggingface_hub
    except ImportError:
        return False
    return isinstance(
        huggingface_hub.try_to_load_from_cache(url.removeprefix("hf-hub:"), "model.safetensors"), str
    )


def check(task: Task) -> None:
    """Makes sure that a task can begin, and downloads its weights.

    Raises:
      UserError: its dataset cannot be opened, its weights cannot be had, or a config is changed that it does not have.
    """
    if task.row.weights and task.overrides:
        raise UserError(f"{task.name} evaluates weights and has no config: leave out {task.overrides[0]}")
    open_dataset(task)
    if task.weights:
        find(task.weights)
