"""Features of files and splits: what is written, which images are similar, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from mlpmixer_flax import load
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.embed import main
from mlpmixer_flax.inference.embedding import nearest


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 40 test digits as PNG files, <class>/<number>.png, and one that is not an image."""
    folder = tmp_path_factory.mktemp("images") / "digits"
    examples = open_examples("digits", "test")
    for i in range(40):
        place = folder / str(examples.labels[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(examples.images[i, ..., 0]).save(place / f"{i:02}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_rows_of_files_are_those_of_the_model_and_a_broken_file_is_left_out(
    digits_run, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(digits.parent)
    output = tmp_path / "new" / "digits.npz"
    assert main([f"--workdir={digits_run}", "digits", f"--output={output}", "--batch_size=16"]) == 1
    out, err = capsys.readouterr()
    assert f"{output}: features of 40 images, 16 numbers each, by {digits_run}\n" in out
    assert err.startswith("error: image 'digits/broken.png' cannot be used") and err.count("\n") == 1
    with np.load(output) as found:
        table = dict(found)
    assert set(table) == {"file", "features"}
    files = sorted(str(file.relative_to(digits.parent)) for file in digits.glob("*/*.png"))
    assert sorted(table["file"].tolist()) == files
    expected = load(digits_run).features(table["file"].tolist())
    np.testing.assert_allclose(table["features"], expected, atol=1e-6)
    assert table["features"].dtype == np.float32


def test_rows_of_a_split_have_labels_and_both_formats_have_the_same(digits_run, tmp_path):
    for name in ("test.npz", "test.parquet"):
        assert main([f"--workdir={digits_run}", "--split=test[:50]", f"--output={tmp_path / name}"]) == 0
    found = parquet.read_table(tmp_path / "test.parquet")
    with np.load(tmp_path / "test.npz") as table:
        assert found.column_names == list(table) == ["label", "class_name", "features"]
        for name in table:
            np.testing.assert_array_equal(np.stack(found[name].to_numpy()), table[name])
        examples = open_examples("digits", "test[:50]")
        assert table["label"].tolist() == examples.labels.tolist()
        assert table["class_name"].tolist() == [str(label) for label in examples.labels]
        photos = [image[..., 0] for image in examples.images]
        np.testing.assert_allclose(table["features"], load(digits_run).features(photos), atol=1e-5)


SCENES = ["zero|round", "round", "", "zero", "round|zero", ""]


@pytest.fixture(scope="module")
def scenes(digits, tmp_path_factory):
    """A table of the digits; the first training images have two labels, one or none."""
    folder = shutil.copytree(digits, tmp_path_factory.mktemp("scenes") / "digits")
    labels = [*SCENES, *["zero"] * 34]
    files = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.png"))
    splits = ["train"] * 6 + ["validation"] * 34
    rows = [",".join(row) for row in zip(files, labels, splits, strict=True)]
    table = folder / "scenes.csv"
    table.write_text("\n".join(["file,labels,split", *rows]))
    return table


def test_rows_of_images_with_several_labels_have_all_of_them(digits_run, scenes, tmp_path, capsys):
    source = [f"--workdir={digits_run}", f"--dataset=table:{scenes}", "--split=train"]
    query = scenes.parent / "0" / "07.png"
    for name in ("scenes.npz", "scenes.parquet"):
        assert main([*source, f"--nearest={query}", f"--output={tmp_path / name}"]) == 0
    found = parquet.read_table(tmp_path / "scenes.parquet")
    with np.load(tmp_path / "scenes.npz") as table:
        assert found.column_names == list(table) == ["file", "label", "class_name", "features"]
        assert table["class_name"].tolist() == ["round|zero", "round", "", "zero", "round|zero", ""]
        # in the order of the classes, "round" and "zero"
        assert table["label"].tolist() == [[1, 1], [1, 0], [0, 0], [0, 1], [1, 1], [0, 0]]
        for name in table:
            np.testing.assert_array_equal(np.stack(found[name].to_numpy()), table[name])
    lines = capsys.readouterr().out.splitlines()
    assert {line.rpartition(", ")[2] for line in lines if ".png, " in line} <= {
        "round",
        "zero",
        "round|zero",
        "(none)",
    }
    assert any(line.endswith(".png, (none)") for line in lines)


def test_similar_images_are_printed_and_drawn_without_the_image_itself(digits_run, digits, tmp_path, capsys):
    query = sorted(digits.glob("0/*.png"))[0]
    good = sorted(map(str, digits.glob("*/*.png")))
    twin = tmp_path / "twin.png"  # the same pixels in another file are found, and are the most similar
    twin.write_bytes(query.read_bytes())
    output = tmp_path / "out.npz"
    arguments = [f"--nearest={query}", f"--nearest={good[-1]}", "--count=9", f"--output={output}"]
    assert main([f"--workdir={digits_run}", *good, str(twin), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f"most similar to {query}:")
    first, *others = (line.split(maxsplit=1) for line in lines[start + 1 : start + 10])
    assert first == ["1.000", str(twin)]
    assert lines[start + 10].startswith("most similar to ") and len(lines[start + 11 :]) == 9 + 1
    features = load(digits_run).features([str(query), *(name for _, name in others)]).astype(float)
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = directions[1:] @ directions[0]
    np.testing.assert_allclose([float(score) for score, _ in others], expected, atol=1e-3)
    assert lines[-1] == f"sheet: {tmp_path / 'out.png'}"
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.width == 1200 and str(digits_run) in sheet.info["Title"].replace("\n", "")


def test_an_image_of_a_split_is_not_similar_to_itself(digits_run, scenes, tmp_path, capsys, monkeypatch):
    """Also if it is named by another path than that of the dataset."""
    monkeypatch.chdir(scenes.parent)
    query = scenes.parent / "0" / "07.png"
    for dataset in (f"table:{scenes}", f"folder:{scenes.parent}"):
        arguments = [
            f"--dataset={dataset}",
            "--split=train+validation",
            "--skip_bad_images",
            "--nearest=0/07.png",
        ]
        output = tmp_path / f"{dataset.partition(':')[0]}.npz"
        assert main([f"--workdir={digits_run}", *arguments, "--count=99", f"--output={output}"]) == 0
        out = capsys.readouterr().out
        with np.load(output) as table:
            files = table["file"].tolist()
        assert str(query.relative_to(scenes.parent)) in files
        for file in files:
            assert (f"  {file}, " in out) == (file != "0/07.png")


def test_similar_images_of_a_split_have_their_class(digits_run, digits, tmp_path, capsys):
    query = next(digits.glob("0/*.png"))
    arguments = ["--dataset=digits", "--split=train[:100]", f"--nearest={query}", "--count=3"]
    assert main([f"--workdir={digits_run}", *arguments, f"--output={tmp_path / 'a.npz'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ", image" in line or " image " in line]
    labels = open_examples("digits", "train[:100]").labels
    assert len(lines) == 3
    for line in lines:
        number, name = line.split("image ")[1].split(", ")
        assert name == str(labels[int(number)])


def test_nearest_sorts_by_the_angle_and_leaves_rows_out():
    features = np.array([[1, 0], [0, 9], [2, 2], [-3, 0], [0, 0]], np.float32)
    rows, similarity = nearest(np.array([5, 0], np.float32), features, 3)
    assert rows.tolist() == [0, 2, 1] and similarity == pytest.approx([1, 0.5**0.5, 0])
    rows, _ = nearest(np.array([5, 0], np.float32), features, 9, leave_out=[0, 1])
    assert rows.tolist() == [2, 4, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{image}", "--output=a.csv"], "'a.csv' has no format: give a name that ends in .npz or .parquet"),
        (["{image}", "--output=a.npz", "--count=0"], "count=0 must be at least 1"),
        (["{image}", "--dataset=digits", "--output=a.npz"], "images and a split are both given: leave out"),
        (["absent.png", "--output=a.npz"], "'absent.png' does not exist"),
        (["{image}", "--nearest=absent.png", "--output=a.npz"], "'absent.png' does not exist"),
        (["{image}", "--nearest={image}", "--count=701", "--output=a.npz"], "does not fit on a sheet"),
        (["{broken}", "--output=a.npz"], "broken.png' cannot be used"),
        (["{image}", "--nearest={broken}", "--output=a.npz"], "broken.png' cannot be used"),
        (["{image}", "--nearest={image}", "--output=a.npz"], "there is no other image to compare --nearest="),
        # The sheet would replace an image
        (
            ["{image}", "--nearest={image}", "--output={sheet}"],
            "which is one of the images: choose another --output",
        ),
        (
            [
                "--nearest={image}",
                "--output={sheet}",
                "--dataset=folder:{folder}",
                "--split=train+validation",
            ],
            "which is one of",
        ),
    ],
)
def test_an_error_is_one_line_and_nothing_is_written(
    arguments, message, digits_run, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    image = next(digits.glob("0/*.png"))
    places = {
        "image": image,
        "broken": digits / "broken.png",
        "sheet": image.with_suffix(".npz"),
        "folder": digits,
    }
    before = image.read_bytes()
    arguments = [argument.format(**places) for argument in arguments]
    assert main([f"--workdir={digits_run}", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert list(Path().iterdir()) == [] and image.read_bytes() == before


def test_one_of_several_tasks_is_refused(tmp_path, monkeypatch, capsys):
    for name, value in {"SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert main(["--workdir=nowhere", f"--output={tmp_path / 'a.npz'}"]) == 2
    assert "embed works in one process" in capsys.readouterr().err


def test_images_and_output_may_be_remote(digits_run, digits, bucket, tmp_path, capsys):
    import fsspec

    fs, root = fsspec.url_to_fs(bucket)
    fs.put(str(digits / "0"), f"{root}/zeros", recursive=True)
    arguments = [
        f"{bucket}/zeros",
        f"--nearest={digits / '0' / '07.png'}",
        f"--output={bucket}/out/zeros.npz",
    ]
    assert main([f"--workdir={digits_run}", *arguments]) == 0
    assert f"sheet: {bucket}/out/zeros.png" in capsys.readouterr().out
    fs.get(f"{root}/out/", str(tmp_path / "out"), recursive=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"zeros.npz", "zeros.png"}
    with np.load(tmp_path / "out" / "zeros.npz") as table:
        names = [f"{bucket}/zeros/{file.name}" for file in sorted((digits / "0").iterdir())]
        assert table["file"].tolist() == names
