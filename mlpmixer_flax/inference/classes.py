"""Class names of ImageNet, and how the classes of a dataset are matched to those of a model."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.limits import show
from mlpmixer_flax.weights.download import fetch

# From Big Transfer, which was trained on the same classes in the same order.
IMAGENET21K_NAMES = "https://storage.googleapis.com/bit_models/imagenet21k_wordnet_lemmas.txt"


def in_words(class_names: Sequence[str]) -> list[str]:
    """Returns class names with WordNet numbers of ImageNet-1k, such as "n01440764", replaced by words."""
    words = dict(_imagenet1k())
    return [words.get(name, name) for name in class_names]


def _imagenet1k() -> list[tuple[str, str]]:
    """Returns (WordNet number, words) per class, in the order of a model's outputs; no words occur twice."""
    lines = (Path(__file__).parent / "imagenet1k.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    times = Counter(words for _, words in rows)  # a crane is a bird and a machine
    return [(number, words if times[words] == 1 else f"{words} ({number})") for number, words in rows]


def numbers(num_classes: int) -> list[str]:
    """Returns "0", "1", ...: the class names if the real ones are unknown."""
    return [str(number) for number in range(num_classes)]


def imagenet_names(num_classes: int) -> list[str]:
    """Returns the class names of ImageNet-1k or 21k, chosen by the number of classes; else "0", "1", ...

    The names of ImageNet-21k are downloaded. If that fails, prints a note and returns numbers.
    """
    if num_classes == 1000:
        return [words for _, words in _imagenet1k()]
    if num_classes == 21843:
        try:
            names = fetch(IMAGENET21K_NAMES).read_text(encoding="utf-8").splitlines()
        except UserError as error:
            print(
                f"classes are shown by number, because their names cannot be downloaded: {error}",
                file=sys.stderr,
            )
            names = []
        if len(names) == num_classes:
            return names
    return numbers(num_classes)


def match_classes(theirs: Sequence[str], ours: Sequence[str], *, numbered: bool = True) -> np.ndarray:
    """Returns the model's class for each class of a dataset: int32 (classes of the dataset,).

    Classes are matched by name; the dataset may have only some of the model's classes. If the class names of
    the dataset or the model are only "0", "1", ..., and both have the same number of classes, classes are
    matched by number, and a note is printed. For a folder or table, whose numbers mean nothing, give `numbered=False`.

    Raises:
      UserError: the dataset has a class that the model does not have.
    """
    if list(theirs) == list(ours):
        return np.arange(len(ours), dtype=np.int32)
    number_of = {name: number for number, name in enumerate(ours)}
    times = Counter(ours)
    unknown = [name for name in theirs if times[name] != 1]
    if not unknown:
        return np.array([number_of[name] for name in theirs], np.int32)
    if numbered and len(theirs) == len(ours) and numbers(len(ours)) in (list(theirs), list(ours)):
        print(
            "classes are matched by number, because the class names of the dataset or the model are unknown: check "
            "that class 0, 1, ... means the same in both"
        )
        return np.arange(len(ours), dtype=np.int32)
    if twice := [name for name in unknown if times[name]]:
        raise UserError(
            f"the model has several classes named {', '.join(map(show, twice[:3]))}, so the classes of the dataset cannot be "
            "matched to them: rename them in the dataset and in the file of the weights"
        )
    raise UserError(
        f"the model has no class named {', '.join(map(show, unknown[:3]))}; the dataset has {len(theirs)} "
        f"classes, the model {len(ours)} such as {', '.join(map(show, ours[:3]))}: choose another dataset, or rename the classes of the dataset"
    )
