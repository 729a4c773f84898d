"""Examples of TFDS datasets that cannot be used."""

import json

import numpy as np
import pytest
from made_datasets import encode, write_dataset
from small_runs import TINY, rows

from mlpmixer_flax import UserError
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, iterate, open_examples
from mlpmixer_flax.evaluate import main as evaluate
from mlpmixer_flax.train import main

SIZE = 8


def write_pair(root, bad, number=40):
    """Writes datasets "bad" and "good" of random images; returns their directory.

    `bad` is place -> kind of flaw in "bad"; "good" has the other images.
    """
    rng = np.random.default_rng(0)
    examples = [(encode(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)), i % 3) for i in range(number)]
    good = [example for place, example in enumerate(examples) if place not in bad]
    marks = {}
    for place, kind in bad.items():
        image, label = examples[place]
        marks[place] = b"here is record %d" % place
        examples[place] = {
            "cut": (image[:-60], label),
            "text": (b"not an image", label),
            "size": (encode(np.zeros((7, SIZE, 3), np.uint8)), label),
            "label": (image, -1),
            "record": (image + marks[place], label),
        }[kind]
    test = good[:9]
    write_dataset(root, "bad", {"train": examples, "test": test}, image_shape=(SIZE, SIZE, 3))
    write_dataset(root, "good", {"train": good, "test": test}, image_shape=(SIZE, SIZE, 3))
    (file,) = (root / "bad" / "1.0.0").glob("*train.array_record*")
    content = file.read_bytes()
    for place, kind in bad.items():
        if kind == "record":
            assert content.count(marks[place]) == 1
            content = content.replace(marks[place], bytes(len(marks[place])))
    file.write_bytes(content)
    return str(root)


BAD = {3: "cut", 6: "text", 8: "record", 20: "size", 39: "label"}


REASONS = {
    "cut": "OSError: ",
    "text": "it is a text file, not an image",
    "record": "its record is damaged: RuntimeError: Corrupted",
    "size": "ValueError: its shape is (7, 8, 3), not (8, 8, 3)",
    "label": "ValueError: its label -1 is not in [0, 3)",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), BAD)


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_batches_are_those_of_the_dataset_without_its_bad_examples(pair, cache_bytes, capsys):
    options = {"data_dir": pair, "cache_bytes": cache_bytes}
    good = open_examples("good", "train", **options)
    found = open_examples("bad", "train", skip_bad_images=True, **options)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "left out 5 of the 40 images of split 'train' of dataset 'bad', because they cannot"
    )
    for place, kind in BAD.items():
        name = str(place) if kind == "record" else f"{place} (train-{place})"
        assert any(line.startswith(f"  {name!r}: {REASONS[kind]}") for line in lines)
    assert len(found) == len(good) == 35 and (found.skipped, good.skipped) == (5, 0)
    for count in (1, 2):  # hosts
        for k in (0, 3, 1000):
            for i in range(count):
                ours, theirs = (
                    TrainBatches(e, batch_size=16, seed=1, shard_index=i, shard_count=count)[k]
                    for e in (found, good)
                )
                assert all((ours[name] == theirs[name]).all() for name in ours)
    ours, theirs = TestBatches(found, batch_size=16), TestBatches(good, batch_size=16)
    assert len(ours) == len(theirs) == 3 and [b["mask"].sum() for b in iterate(ours, 0, 3)] == [16, 16, 3]
    assert all((ours[2][name] == theirs[2][name]).all() for name in theirs[2])


def test_a_slice_leaves_out_its_own_bad_examples(pair, capsys):
    found = open_examples("bad", "train[5:10]", data_dir=pair, skip_bad_images=True, cache_bytes=0)
    whole = open_examples("good", "train", data_dir=pair)
    assert len(found) == 3 and found.skipped == 2
    assert whole.images is not None
    np.testing.assert_array_equal(found.read(np.arange(3))[0], whole.images[[4, 5, 6]])
    assert len(open_examples("bad", "train[:3]", data_dir=pair, skip_bad_images=True)) == 3
    capsys.readouterr()
    with pytest.raises(
        UserError, match="no image of split 'train.6:7..train.8:9.' of dataset 'bad' can be used: repair some"
    ):
        open_examples("bad", "train[6:7]+train[8:9]", data_dir=pair, skip_bad_images=True)


@pytest.mark.parametrize(("place", "kind"), BAD.items())
@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_without_skipping_a_bad_example_is_named_with_what_to_do(pair, place, kind, cache_bytes):
    with pytest.raises(UserError) as error:
        # A larger chunk has good records beside it.
        examples = open_examples(
            "bad", f"train[{place - 1}:{place + 1}]", data_dir=pair, cache_bytes=cache_bytes
        )
        examples.read(np.arange(2))
    assert str(error.value).startswith("image 1 ")
    assert (
        f" of split 'train[{place - 1}:{place + 1}]' of dataset 'bad' cannot be used ({REASONS[kind]}"
        in str(error.value)
    )
    assert str(error.value).endswith(
        "): restore or prepare the dataset again, or leave out what cannot be used with --skip_bad_images (in training "
        "--config.skip_bad_images=true)"
    )


def test_bad_examples_of_varying_size_are_skipped_and_the_list_of_them_is_bounded(tmp_path, capsys):
    rng = np.random.default_rng(0)
    photos = [encode(rng.integers(0, 255, (20 + i, 30, 3), np.uint8), "JPEG") for i in range(30)]
    examples = [(photo if i % 2 else photo[:-40], i % 3) for i, photo in enumerate(photos)]
    data_dir = write_dataset(tmp_path, "varied", {"train": examples})
    options = {"data_dir": data_dir, "image_size_px": 16, "min_crop_area": 0.3, "skip_bad_images": True}
    found = open_examples("varied", "train", **options)
    assert found.images is None and len(found) == found.skipped == 15
    assert TrainBatches(found, batch_size=40, seed=0)[0]["image"].shape == (40, 16, 16, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-12].startswith("left out 15 of the 30 images") and lines[-1] == "  and 5 more"


@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_a_missing_or_cut_file_of_a_dataset_is_not_skipped(tmp_path, skip_bad_images):
    data_dir = write_pair(tmp_path, {}, number=200)
    (file,) = (tmp_path / "bad" / "1.0.0").glob("*train.array_record*")
    content = file.read_bytes()
    for change, words in [
        (lambda: file.write_bytes(content[: len(content) - 10]), "RiegeliPostscript"),
        (lambda: file.write_bytes(b""), "at least 64KB"),
        (
            lambda: file.unlink(),
            "open.. failed: No such file or directory; opening .*array_record-00000-of-00001",
        ),
    ]:
        change()
        with pytest.raises(
            UserError,
            match=f"^split 'train' of dataset 'bad' cannot be read .*{words}.*: restore its files or mount their dir",
        ):
            open_examples("bad", "train", data_dir=data_dir, skip_bad_images=skip_bad_images)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_streamed_tfds_dataset_trains_without_its_bad_examples_and_they_are_counted(pair, tmp_path, capsys):
    logged = {}
    for name in ("bad", "good"):
        arguments = [
            f"--config.dataset={name}",
            f"--config.data_dir={pair}",
            f"--workdir={tmp_path / name}",
            *TINY,
        ]
        arguments += [
            "--config.skip_bad_images=True",
            "--config.cache_bytes=0",
            "--config.test_split=train[:30]",
        ]
        assert main(["--config=digits.py", *arguments]) == 0
        logged[name] = rows(tmp_path / name)
    assert "5 of the 40 images of split 'train' of dataset 'bad', because" in capsys.readouterr().out
    (training, evaluation), (other_training, other_evaluation) = logged["bad"], logged["good"]
    assert training["train/skipped_images"] == 5 and evaluation["validation/skipped_images"] == 4
    assert other_training["train/skipped_images"] == other_evaluation["validation/skipped_images"] == 0
    for key in ("train/loss", "train/accuracy", "train/gradient_norm", "train/parameter_norm"):
        assert training[key] == other_training[key]
    # The programs take skip_bad_images from the run, and score the images that are left.
    assert evaluate([f"--workdir={tmp_path / 'bad'}", f"--output={tmp_path / 'scores'}"]) == 0
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["images"] == sum(row["images"] for row in scores["per_class"]) == 26
    assert scores["loss"] == pytest.approx(evaluation["validation/loss"])
