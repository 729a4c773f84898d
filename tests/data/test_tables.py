"""Tables of labelled images: what is read from CSV and Parquet, and what is said about tables that cannot be used."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from made_folders import open_to_train, write
from pyarrow import parquet

from mlpmixer_flax import UserError
from mlpmixer_flax.data import tables
from mlpmixer_flax.data.dataset import find_dataset, get_dataset_info, with_absolute_path
from mlpmixer_flax.data.listing import select_split
from mlpmixer_flax.data.tables import read_table
from mlpmixer_flax.data.tfds import load_builder
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, open_examples

ONE = [("a/1.png", "cat", "train"), ("a/2.png", "dog", "train"), ("b/3.png", "cat", "test")]
SEVERAL = [("a/1.png", "cat|dog", "train"), ("a/2.png", "", "train"), ("b/3.png", " dog | dog", "val")]


def write_csv(root, rows, *, head="file,label,split", name="labels.csv", encoding="utf-8"):
    """Writes a table, and an image for each of its rows; returns the name of the table."""
    write(root, *(row[0] for row in rows))
    path = Path(root, name)
    path.write_text(
        "".join(line + "\n" for line in [head, *(",".join(row) for row in rows)]), encoding=encoding
    )
    return str(path)


def write_parquet(root, columns):
    path = Path(root, "labels.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def of_split(path, split):
    """Returns (files, labels) of a split."""
    records = select_split(read_table(path), split)
    return records.files, records.labels


@pytest.mark.parametrize("form", ["csv", "with a mark", "parquet"])
def test_each_image_has_one_label_and_a_split_in_the_order_of_the_rows(tmp_path, form):
    if form == "parquet":
        write(tmp_path, *(row[0] for row in ONE))
        path = write_parquet(
            tmp_path, dict(zip(("file", "label", "split"), zip(*ONE, strict=True), strict=True))
        )
    else:
        path = write_csv(tmp_path, ONE, encoding="utf-8-sig" if form == "with a mark" else "utf-8")
    # The only images of their classes: none of them becomes one for validation.
    assert of_split(path, "train") == (["a/1.png", "a/2.png"], [0, 1])
    assert of_split(path, "test") == (["b/3.png"], [0])
    info = get_dataset_info(f"table:{path}", "train")
    assert (info["num_examples"], info["class_names"], info["multi_label"]) == (2, ["cat", "dog"], False)
    assert of_split(path, "train[:1]+test")[0] == ["a/1.png", "b/3.png"]
    assert find_dataset(f"table:{path}").count_overlap("train", "train[1:]+test") == 1


@pytest.mark.parametrize("form", ["csv", "text", "lists"])
def test_each_image_may_have_several_labels_or_none(tmp_path, form):
    path = write_csv(tmp_path, SEVERAL, head="file,labels,split")
    if form != "csv":
        files, labels, splits = zip(*SEVERAL, strict=True)
        labels = [["cat", "dog"], None, ["dog", "dog"]] if form == "lists" else labels
        path = write_parquet(tmp_path, {"file": files, "labels": labels, "split": splits})
    assert of_split(path, "train") == (["a/1.png", "a/2.png"], [(0, 1), ()])
    examples = open_examples(f"table:{path}", "train+validation", image_size_px=4)
    assert examples.multi_label and examples.labels.dtype == np.uint8
    expected = [[1, 1], [0, 0], [0, 1]]
    np.testing.assert_array_equal(examples.known_labels, expected)
    streamed = open_examples(f"table:{path}", "train+validation", image_size_px=4, cache_bytes=0)
    np.testing.assert_array_equal(streamed.read(np.array([2, 0]))[1], [[0, 1], [1, 1]])
    (batch,) = [TestBatches(streamed, batch_size=4)[0]]
    np.testing.assert_array_equal(batch["label"], [*expected, [0, 0]])
    assert batch["mask"].tolist() == [True] * 3 + [False] and batch["label"].dtype == np.uint8
    assert TrainBatches(streamed, batch_size=2, seed=0)[0]["label"].shape == (2, 2)


def test_a_fifth_of_the_images_is_for_validation_and_the_last_of_a_class_never(tmp_path):
    rows = [(f"{i}.png", "cat" if i % 2 else "dog") for i in range(100)] + [
        (f"rare {i}.png", f"rare {i}") for i in range(30)
    ]
    path = write_csv(tmp_path, rows, head="file,label")
    table = read_table(path)
    train, validation = (of_split(path, split)[0] for split in ("train", "validation"))
    assert 10 <= len(validation) <= 30 and not any("rare" in file for file in validation)
    assert sorted([*train, *validation]) == sorted(row[0] for row in rows)
    assert f"about a fifth of the images, {len(validation):,} chosen by a hash" in table.notes[0]
    few = write_csv(tmp_path / "few", [(f"{i}.png", "cat") for i in range(3)], head="file,label")
    assert len(of_split(few, "validation")[0]) >= 1 <= len(of_split(few, "train")[0])
    # Other rows change no split.
    again = write_csv(tmp_path / "more", [("new.png", "cat"), *rows[::-1]], head="file,label")
    assert set(of_split(again, "validation")[0]) - {"new.png"} == set(validation)


def test_names_may_have_commas_lines_and_any_script_and_numbers_are_names(tmp_path):
    rows = [("a, b.png", "shark, man-eater"), ("кошка.png", "ñandú"), ("3.png", "7"), ("./x/../4.png", "7")]
    text = "file,label\n" + "".join(f'"{file}","{label}"\n\n' for file, label in rows)
    (tmp_path / "labels.csv").write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    table = read_table(str(tmp_path / "labels.csv"))
    assert table.class_names == ["7", "shark, man-eater", "ñandú"]
    assert sorted(of_split(table.path, "all")[0]) == ["3.png", "4.png", "a, b.png", "кошка.png"]
    path = write_parquet(
        tmp_path, {"file": ["a.png", "b.png"], "label": [7, 12], "split": ["train", "train"]}
    )
    assert read_table(path).class_names == ["12", "7"]


def test_a_label_with_the_separator_and_other_columns_are_mentioned(tmp_path):
    rows = [("a.png", "cat|dog", "train", "x"), ("b.png", "cat", "train", "y"), ("c.png", "cat", "val", "z")]
    table = read_table(write_csv(tmp_path, rows, head="file,label,split,author"))
    assert table.class_names == ["cat", "cat|dog"]
    notes = "\n".join(table.notes)
    assert "that are not used: 'author'" in notes and "call the column 'labels'" in notes


BAD = {
    "file,label\na.png,cat\nb.png\n": "line 3 of '.*' has 1 fields, but the first line 2: write one",
    "file,label\na.png,cat\n,cat\n": "line 3 of '.*' has a file that is empty",
    "file,label\na.png,\n": "line 2 of '.*' has a label that is empty",
    "file,labels\na.png,cat||dog\n": "line 2 of '.*' has a label that is empty",
    "file,label\na.png,cat\nb.png,c\x07t\n": r"line 3 of '.*' has a label that has control characters \('c\\x07t'\)",
    "file,label\na\x1b[31m.png,cat\n": "line 2 of '.*' has a file that has control characters",
    f"file,label\na.png,{'x' * 2000}\n": "line 2 of '.*' has a label that is too long",
    "file,label\na.png,cat\n\n\na.png,dog\n": "line 5 of '.*' has 'a.png' again, as line 2 of",
    "file,label\na.png,cat\n./a.png,dog\n": "line 3 of '.*' has 'a.png' again",
    "file,label\n/etc/a.png,cat\n": "line 2 of '.*' has file '/etc/a.png', which is not below the folder",
    "file,label\n../a.png,cat\n": "line 2 of '.*' has file '../a.png', which is not below",
    "file,label,split\na.png,cat,rest\n": "line 2 of '.*' has split 'rest', which is unknown: use train, validation",
    "file,label,split\na.png,cat,\n": "line 2 of '.*' has split '', which is unknown",
    "file,label\n": "has no rows: give each image a row",
    "": "has the columns none, and not those needed: the expected columns are file, label",
    "file;label\na.png;cat\n": "has the columns 'file;label', and not those needed: .* separated by commas",
    "name,class\na.png,cat\n": "has the columns 'name', 'class', and not",
    "file,label,labels\na.png,cat,cat\n": "has the columns 'file', 'label', 'labels', and not",
    "file,label,label\na.png,cat,cat\n": "has the columns 'file', 'label', 'label', one of them twice",
    'file,label\na.png,"cat\n': "line 2 of '.*' cannot be read .*: correct the line",
    "file,labels\na.png,\n": "has 0 classes: give from 1 to 100,000",
    "file,label,split\na.png,cat,train\nb.png,cat,train\nc.png,dog,test\n": "split 'test' of table '.*' has classes that the training",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text)[:40])
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence_with_the_line(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=BAD[text]) as refused:
        get_dataset_info(f"table:{tmp_path / 'labels.csv'}", "test")
    assert "\n" not in str(refused.value)


LONG = pyarrow.array(["x" * 2**16])
AGAIN = pyarrow.array(np.zeros(2**9, np.int32))  # 512 times the first of some values


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "label",
            pyarrow.DictionaryArray.from_arrays(AGAIN, LONG),
            "row 1 of '.*' has a label that is too long",
        ),
        (
            "labels",
            pyarrow.ListArray.from_arrays(np.arange(2**9 + 1), LONG.take(AGAIN)),
            "its content has more",
        ),
        ("label", LONG.take(AGAIN).cast(pyarrow.binary(2**16)), "its content has more than 16,777,216 bytes"),
        ("label", pyarrow.array(np.zeros(2**20, np.int8)), "its content has more than 16,777,216 bytes"),
    ],
    ids=["text", "lists", "bytes", "rows"],
)
def test_a_small_file_that_repeats_a_value_takes_little_memory(
    tmp_path, monkeypatch, column, values, message
):
    """Parquet writes a repeated value once, or only how often it is there."""
    monkeypatch.setattr(tables, "_LARGEST_BYTES", 2**24)
    files = map("{}.png".format, range(len(values))) if len(values) == len(AGAIN) else values
    table = pyarrow.table({"file": pyarrow.array(files), column: values})
    path = str(tmp_path / "labels.parquet")
    parquet.write_table(table, path, store_schema=False)  # so that the file does not say how it was in memory
    assert os.path.getsize(path) < 2**18
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            read_table(path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_bytes_that_are_no_text_and_files_that_are_no_tables_are_refused(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"file,label\na.png,cat\nb.png,c\xe4t\n")
    with pytest.raises(
        UserError, match=r"line 3 of '.*labels.csv' is not UTF-8: save the table as CSV in UTF-8"
    ):
        read_table(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_bytes(b"file,label\na.png,c\0t\n")
    with pytest.raises(UserError, match="line 2 of '.*labels.csv'"):
        read_table(tmp_path / "labels.csv")
    (tmp_path / "labels.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(UserError, match="labels.parquet' cannot be read .*: write it again"):
        read_table(tmp_path / "labels.parquet")
    # Found by fuzzing: asked for the number of values of a column, pyarrow ends the process.
    with pytest.raises(UserError, match="damaged_levels.parquet' cannot be read .*: write it again"):
        read_table(Path(__file__).parent.parent / "golden" / "damaged_levels.parquet")
    path = write_parquet(tmp_path, {"file": ["a.png", None], "label": ["cat", "cat"]})
    with pytest.raises(UserError, match="row 2 of '.*labels.parquet' has a file that is empty"):
        read_table(path)
    path = write_parquet(tmp_path, {"file": ["a.png"], "labels": pyarrow.array([[["cat"]]])})
    with pytest.raises(UserError, match="row 1 of .* has a label that is neither text nor a whole number"):
        read_table(path)
    path = write_parquet(tmp_path, {"file": ["a.png"], "label": [0.5]})
    with pytest.raises(UserError, match="row 1 of .* has a label that is neither text nor a whole number"):
        read_table(path)
    with pytest.raises(
        UserError, match="'.*labels.xlsx' is neither .csv nor .parquet: save it as one of them"
    ):
        read_table(tmp_path / "labels.xlsx")
    with pytest.raises(UserError, match="none.csv' cannot be read .No such file or directory.: give a file"):
        read_table(tmp_path / "none.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match="is a named pipe: give a regular file"):
        read_table(tmp_path / "pipe.csv")
    with pytest.raises(UserError, match="table 's3://bucket/labels.csv' is remote: copy it and its images"):
        read_table("s3://bucket/labels.csv")


def test_images_that_are_missing_or_damaged_are_all_found_at_the_start(tmp_path):
    path = write_csv(tmp_path, [*ONE, ("a/4.png", "cat", "train"), ("a/5.png", "cat", "train")])
    (tmp_path / "a" / "4.png").unlink()
    (tmp_path / "a" / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2 of 5 images in .*(\n.*)*'a/4.png'.*\n.*'a/5.png'"):
        open_to_train(f"table:{path}", "train", "test")
    kept = open_examples(f"table:{path}", "train", skip_bad_images=True)
    assert kept.skipped == 2 - len({"a/4.png", "a/5.png"} & {*of_split(path, "validation")[0]})


def test_one_class_is_enough_only_for_several_labels(tmp_path):
    path = write_csv(tmp_path, [("a.png", "cat", "train"), ("b.png", "cat", "test")])
    with pytest.raises(
        UserError, match="table '.*' has training images of one class only: .* columns are file"
    ):
        open_to_train(f"table:{path}", "train", "test")
    path = write_csv(tmp_path, [("a.png", "cat", "train"), ("b.png", "", "test")], head="file,labels,split")
    assert open_to_train(f"table:{path}", "train", "test")[0].class_names == ["cat"]


def test_a_training_image_without_labels_is_not_taken_for_validation(tmp_path):
    for number in range(10):  # some of these names have a low hash
        rows = [(f"{number}.png", "", "train"), ("test.png", "cat", "test")]
        path = write_csv(tmp_path / f"{number}", rows, head="file,labels,split")
        with pytest.raises(UserError, match="has 0 classes: give from 1"):
            read_table(path)


def test_a_table_may_be_named_from_any_directory_and_a_file_alone_is_corrected(tmp_path, monkeypatch):
    write_csv(tmp_path, ONE)
    monkeypatch.chdir(tmp_path)
    assert get_dataset_info("table:labels.csv", "train")["num_examples"] == 2
    assert with_absolute_path("table:labels.csv") == f"table:{tmp_path / 'labels.csv'}"
    assert with_absolute_path("digits") == "digits"
    with pytest.raises(UserError, match="'labels.csv' is not a TFDS name: did you mean 'table:labels.csv'?"):
        load_builder("labels.csv", "")
