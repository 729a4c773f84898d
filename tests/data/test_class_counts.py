"""The text about the classes at the start of a run."""

import numpy as np
import pytest
from made_datasets import encode, write_dataset
from made_folders import names, write
from rich.cells import cell_len

from mlpmixer_flax.data.class_counts import describe_classes
from mlpmixer_flax.dataloader import open_examples


def labels(*counts):
    return np.repeat(np.arange(len(counts)), counts)


def test_a_rare_class_a_majority_and_a_class_without_validation_images_are_pointed_out(tmp_path):
    """As in shared/cases/imbalance: a class that accuracy hides."""
    write(tmp_path, *names("train/red", 60), *names("train/green", 4), *names("train/blue", 16))
    write(tmp_path, *names("val/red", 6), *names("val/blue", 2))
    examples = {
        split: open_examples(f"folder:{tmp_path}", split, image_size_px=4, cache_bytes=cache_bytes)
        for split, cache_bytes in [("train", 0), ("val", 2**30)]
    }
    text = describe_classes(
        ["blue", "green", "red"],
        examples["train"].known_labels,
        examples["val"].known_labels,
        test_split="validation",
    )
    assert text.splitlines() == [
        "training images per class: blue: 16, green: 4, red: 60",
        "rare (fewer than 10 training images): green: 4",
        "red has 75 % of the training images,",
        "  so always answering red would be right for 75 % of them",
        "without an image in split 'validation': green",
    ]


def test_classes_of_one_size_need_one_line():
    assert describe_classes(["a", "b"], labels(50, 50), labels(5, 5), test_split="test") == (
        "training images per class: a: 50, b: 50"
    )
    assert "has" not in describe_classes(["a", "b"], labels(54, 46), None, test_split="test")
    assert "c has 51 %" in describe_classes([*"abc"], labels(25, 24, 51), None, test_split="test")
    assert describe_classes([*"abc"], labels(500, 50, 49), None, test_split="test").count("rare") == 0
    text = describe_classes([*"abc"], labels(5000, 5000, 499), None, test_split="test")
    assert "rare (fewer than a tenth of the median, 500): c: 499" in text
    assert "every class is rare: fewer than 10 training images" in describe_classes(
        [*"ab"], labels(9, 0), None, test_split="test"
    )


@pytest.mark.parametrize("number", [1, 2, 5, 30, 100, 1000, 21843])
@pytest.mark.parametrize(
    "name", ["class", "猫" * 30, "a very long name of a class, with a comma", "line\nbreak \udce9 \x1b[31m"]
)
def test_the_text_has_few_lines_of_80_columns_for_any_classes(number, name):
    counts = np.random.default_rng(0).integers(0, 7, number) ** 3
    counts[0] = counts.sum() + 1
    class_names = [f"{name} {i}" if i % 2 else f"{i} {name}" for i in range(number)]
    for train in (labels(*counts), np.zeros(0, int), None):
        text = describe_classes(class_names, train, [0], test_split=f"{name}[:90%]+test")
        lines = text.splitlines()
        assert 0 < len(lines) <= 11
        for line in lines:
            assert line.isprintable() and cell_len(line) <= 80
    if number > 100:
        assert text.startswith("classes: ") and "and" in text


def test_labels_that_are_known_only_when_read_are_said_to_be_unknown(tmp_path):
    image = encode(np.zeros((4, 4, 3), np.uint8))
    write_dataset(tmp_path, "mine", {"train": [(image, i % 3) for i in range(12)]}, image_shape=(4, 4, 3))
    streamed, kept = (
        open_examples("mine", "train", data_dir=str(tmp_path), cache_bytes=n) for n in (0, 2**30)
    )
    assert streamed.known_labels is None
    np.testing.assert_array_equal(kept.known_labels, [0, 1, 2] * 4)
    assert describe_classes(["cat", "dog", "emu"], None, None, test_split="test") == "classes: cat, dog, emu"
