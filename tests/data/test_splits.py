"""The syntax of splits: the same for TFDS datasets and folders, with TFDS's own results."""

import collections
import random
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_datasets import encode, write_dataset
from made_folders import names, write

from mlpmixer_flax import UserError, get_dataset_info
from mlpmixer_flax.data.dataset import find_dataset
from mlpmixer_flax.data.splits import Part, count_common
from mlpmixer_flax.data.tfds import load_builder
from mlpmixer_flax.dataloader import open_examples

TRAIN, VALIDATION, TEST = 43, 9, 16


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A TFDS dataset and a folder with the same numbers of images; returns the arguments that name each."""
    root = tmp_path_factory.mktemp("both")
    counts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    image = encode(np.zeros((4, 4, 3), np.uint8))
    data_dir = write_dataset(
        root, "mine", {split: [(image, i % 3) for i in range(n)] for split, n in counts.items()}
    )
    for split, n in counts.items():
        for i, name in enumerate(("cat", "dog", "emu")):
            write(root / "photos", *names(f"{split}/{name}", len(range(i, n, 3))))
    return {"tfds": ("mine", data_dir), "folder": (f"folder:{root / 'photos'}", "")}


# What TFDS's guide on splits shows (https://www.tensorflow.org/datasets/splits) and its parser reads
IN_THE_GUIDE = [
    "train", "all", "train+test", "train + test", "train[:75%]", "train[25%:75%]", "train[10:20]", "train[:10]",
    "train[-10%:]", "train[-10:]", "train[:-10%]", "train[:33.3%]", "train[66.67%:]", "train[:1_0]", "train[10:20%]",
    "test+train[:75%]", "train[:25%]+test", "train[:0%]+train[10%:]", "train[:90%]+train[100%:]", "train[0:43]",
    *(f"train[:{k}%]+train[{k + 10}%:]" for k in range(0, 100, 10)), *(f"train[{k}%:{k + 10}%]" for k in (0, 50, 90)),
]  # fmt: skip


@pytest.mark.parametrize("split", IN_THE_GUIDE)
@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_the_splits_of_the_guide_have_as_many_examples_as_in_tfds(both, kind, split):
    expected = len(load_builder(*both["tfds"]).as_data_source(split))
    dataset, data_dir = both[kind]
    assert get_dataset_info(dataset, split, data_dir=data_dir)["num_examples"] == expected > 0
    assert len(open_examples(dataset, split, data_dir=data_dir, cache_bytes=0)) == expected


def test_slices_of_a_folder_are_the_examples_at_the_places_of_tfds(both):
    dataset, _ = both["folder"]
    files = {split: open_examples(dataset, split).files or [] for split in ("train", "validation", "test")}
    for split, expected in {
        "train[-10%:]": files["train"][39:],
        "train[:10%]+train[20%:]": files["train"][:4] + files["train"][9:],
        "test[5:7]+validation": files["test"][5:7] + files["validation"],
        "all": files["train"] + files["validation"] + files["test"],
    }.items():
        assert open_examples(dataset, split).files == expected


def test_any_text_is_read_or_refused_as_tfds_does_for_datasets_and_folders(both):
    splits, rng = load_builder(*both["tfds"]).info.splits, random.Random(0)
    ends = "5 0 -3 -43 -44 1_0 05 +5 2.5 10% 50% 33.3% 99.9% 100% 101% -10% 1shard".split() + [""] * 6
    found = collections.Counter()
    for _ in range(400):
        terms = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice(["train", "train", "test", "validation", "all", "tset", "tr ain", "train-0"])
            slices = [f"[{rng.choice(ends)}:{rng.choice(ends)}]"] * 3 + [f"[{rng.choice(ends)}]"]
            terms.append(name + rng.choice(["", "", *slices]))
        text = rng.choice(["+", " + "]).join(terms)
        if "shard" in text:
            continue  # folders have none
        try:
            ranges = tfds.core.ReadInstruction.from_spec(text).to_absolute(splits)
            backwards = any(part.to is not None and part.to < (part.from_ or 0) for part in ranges)
            # TFDS counts a range that ends before it begins as less than nothing.
            expected = 0 if backwards else splits[text].num_examples
        except Exception:
            expected = "refused"
        for dataset, data_dir in both.values():
            try:
                number = get_dataset_info(dataset, text, data_dir=data_dir)["num_examples"]
            except UserError as error:
                number = "refused" if "cannot be read" in str(error) else 0
            assert number == expected, text
        found[expected if expected == "refused" else bool(expected)] += 1
    assert min(found["refused"], found[False], found[True]) > 10, found


@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_even_splits_and_tfds_objects_work(both, kind):
    dataset, data_dir = both[kind]
    for splits, sizes in [
        (tfds.even_splits("train", 3), [15, 14, 14]),
        (tfds.even_splits("train[:50%]+test", 2, drop_remainder=True), [19, 19]),
        ([tfds.Split("train"), tfds.Split("all")], [TRAIN, TRAIN + VALIDATION + TEST]),
        ([tfds.core.ReadInstruction("train", to=10, unit="%")], [4]),
        ([tfds.core.ReadInstruction("test", from_=5) + tfds.core.ReadInstruction("train", to=-3)], [51]),
        ([tfds.even_splits("train", 2)[1] + tfds.even_splits("test", 4)[0]], [25]),
        ([tfds.split_for_jax_process("train", drop_remainder=True)], [TRAIN]),
    ]:
        for split, size in zip(splits, sizes, strict=True):
            assert get_dataset_info(dataset, split, data_dir=data_dir)["num_examples"] == size
            assert len(open_examples(dataset, split, data_dir=data_dir, cache_bytes=0)) == size
    parts = tfds.even_splits("train", 2)
    assert find_dataset(dataset, data_dir=data_dir).count_overlap(parts[0], parts[1]) == 0
    assert find_dataset(dataset, data_dir=data_dir).count_overlap(parts[0], "train") == 22


def test_slices_of_shards_are_for_tfds_datasets_only(both):
    dataset, data_dir = both["tfds"]
    for split in ("train[:1shard]", "train[0shard]"):
        assert get_dataset_info(dataset, split, data_dir=data_dir)["num_examples"] == TRAIN
        with pytest.raises(
            UserError, match="cannot be read .folders and tables have no shards.: use 'test', 'train', 'valid"
        ):
            get_dataset_info(both["folder"][0], split)


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("tset", "Unknown split 'tset'"),
        ("train+tset[:5]", "Unknown split 'tset'"),
        ("", "Unrecognized split format: ''"),
        ("train[", "Unrecognized split format"),
        ("train[::2]", "Unrecognized split format"),
        ("train[:]", "Unrecognized split format"),
        ("valid ation", "Unrecognized split format"),
        ("train[:75%](pct1_dropremainder)", "Unrecognized split format"),
        ("train[5]", "only support slice syntax"),
        ("train[5%]", "only support slice syntax"),
        ("all[:50%]", "'all' does not support slice"),
        ("train[:44]", "incompatible with 43 examples"),
        ("train[:101%]", "should be in"),
        ("train[:5.5]", "5.5"),
        (["train", "test"], "Unrecognized split format"),
    ],
)
@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_another_form_is_refused_with_the_reason_and_the_known_splits(both, kind, split, reason):
    dataset, data_dir = both[kind]
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError) as error:
            function(dataset, split, data_dir=data_dir)
        assert str(error.value).startswith(f"split {split!r} of ") and reason in str(error.value)
        assert "cannot be read (" in str(error.value) and "\n" not in str(error.value)
        assert "use 'test', 'train', 'validation'" in str(error.value) and "'train[:90%]'" in str(error.value)


@pytest.mark.parametrize("split", ["train[5:5]", "train[:0%]", "train[50%:40%]", "test+train[50%:40%]"])
@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_an_empty_split_is_refused(both, kind, split):
    dataset, data_dir = both[kind]
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError, match="has no (examples|images): use") as error:
            function(dataset, split, data_dir=data_dir)
        assert repr(split) in str(error.value)


# --- overlap


@pytest.mark.parametrize(
    ("split", "other", "expected"),
    [
        ("train", "test", 0),
        ("train", "train", TRAIN),
        ("train[:80%]", "train[80%:]", 0),
        ("train[:80%]", "train[70%:]", 4),
        ("train+validation", "validation", VALIDATION),
        ("train+validation", "train[40:]+validation[:2]+test", 5),
        ("all", "test", TEST),
        ("train[:10]+train[5:20]", "train[8:12]+train[9:14]", 6),  # each is counted once
        ("train[:0%]+train[10%:]", "train[:10]", 6),
    ],
)
@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_examples_in_both_of_two_splits_are_counted(both, kind, split, other, expected):
    dataset, data_dir = both[kind]
    assert find_dataset(dataset, data_dir=data_dir).count_overlap(split, other) == expected
    assert find_dataset(dataset, data_dir=data_dir).count_overlap(other, split) == expected


def test_overlap_is_counted_by_file_when_a_split_has_two_names(tmp_path):
    write(tmp_path, *names("a", 40), *names("b", 40))
    dataset = f"folder:{tmp_path}"
    number = get_dataset_info(dataset, "validation")["num_examples"]
    for other in ("validation", "val", "test", "dev"):  # without a test split, test is validation
        assert find_dataset(dataset).count_overlap("train", other) == 0
        assert find_dataset(dataset).count_overlap("train+validation", other) == number
    files = [set(open_examples(dataset, split).files or []) for split in ("train[:60%]", "train[50%:]+test")]
    assert (
        find_dataset(dataset).count_overlap("train[:60%]", "train[50%:]+test") == len(files[0] & files[1]) > 0
    )


def test_overlap_of_random_parts_is_that_of_sets_of_examples():
    rng = np.random.default_rng(0)
    for _ in range(100):
        lists = [
            [
                Part("xy"[rng.integers(2)], *sorted(rng.integers(0, 20, 2).tolist()))
                for _ in range(rng.integers(1, 5))
            ]
            for _ in range(2)
        ]
        mine, theirs = ({(p.split, i) for p in parts for i in range(p.start, p.stop)} for parts in lists)
        assert count_common(*lists) == len(mine & theirs)


@pytest.mark.parametrize(
    "function",
    [lambda dataset: dataset.info("nope"), lambda dataset: dataset.count_overlap("train", "nope")],
)
def test_overlap_and_info_refuse_what_cannot_be_read(both, function):
    dataset, data_dir = both["tfds"]
    with pytest.raises(UserError, match="split 'nope' .*: use 'test', 'train'"):
        function(find_dataset(dataset, data_dir=data_dir))


def test_plain_names_of_a_folder_load_no_tfds(both):
    dataset, _ = both["folder"]
    code = f"""
import sys
from mlpmixer_flax.data.dataset import get_dataset_info, find_dataset
get_dataset_info({dataset!r}, "train")
find_dataset({dataset!r}).count_overlap("train", "val")
assert "tensorflow_datasets" not in sys.modules
get_dataset_info({dataset!r}, "train[:50%]")
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
