"""Figures of curves and scores: their contents, read back from the figure, and the files."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.inference import figures


def drawn(figure):
    """Returns the array of the first image in a figure."""
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def test_curves_draw_the_values_of_the_rows_and_leave_out_missing_ones():
    rows = [
        {"step": 10, "train/loss": 2.0, "train/accuracy": 0.2, "train/learning_rate": 0.1},
        {"step": 15, "test/loss": 1.5, "test/accuracy": 0.4, "test/accuracy_top5": 0.8},
        {"step": 20, "train/loss": 1.0, "train/accuracy": 0.6, "train/learning_rate": 0.05},
    ]
    loss, accuracy, rate = figures.curves(rows, title="run").axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, rate)] == ["loss", "accuracy", "learning rate"]
    assert rate.get_xlabel() == "step"
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10, 2], [20, 1]], [[15, 1.5]]]
    names = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert names == ["train, last 0.6", "test, last 0.4", "test, top 5, last 0.8"]
    (only,) = figures.curves([{"step": 1, "test/accuracy": 0.5}], title="run").axes
    assert only.lines[0].get_color() == accuracy.lines[1].get_color()
    with pytest.raises(UserError, match="let the run log"):
        figures.curves([{"step": 1, "images_per_second": 3.0}], title="run")


def test_confusion_shows_fractions_of_the_true_class_and_counts():
    figure = figures.confusion([(2, 2, 15), (2, 0, 5), (0, 0, 3), (0, 1, 1)], ["a", "b", "c"])
    np.testing.assert_array_equal(drawn(figure), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]])
    axes = figure.axes[0]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "3", (1, 0): "1", (0, 2): "5", (2, 2): "15"}  # (predicted, true)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert figure.get_suptitle() == "Confusion matrix: 75.00 % of 24 images are correct"


@pytest.mark.parametrize(("n", "named", "counted"), [(20, 20, 20), (21, 21, 0), (50, 50, 0), (21843, 0, 0)])
def test_confusion_of_many_classes_has_no_counts_and_then_no_names(n, named, counted, tmp_path):
    names = [f"class {i}" for i in range(n)]
    figure = figures.confusion([(i, i, 1) for i in range(n)], names)
    np.testing.assert_array_equal(drawn(figure), np.eye(min(n, 1000)))
    assert figure.axes[0].get_xlim() == (-0.5, n - 0.5)
    figures.save(figure, tmp_path / "confusion.png")
    shown = {label.get_text() for label in figure.axes[0].get_xticklabels()}
    assert len(shown & set(names)) == named and len(figure.axes[0].texts) == counted


def test_mistakes_come_with_the_most_confident_first():
    images = [np.full((size, size, channels), size, np.uint8) for size, channels in [(8, 1), (32, 3), (9, 4)]]
    figure = figures.mistakes(images, ["a", "b", "c"], ["d", "e", "f" * 40], [0.5, 0.25, 0.999])
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    shortened = "f" * 15 + "…"
    assert captions == [
        f"c\n→ {shortened}\n99.9 %",
        "a\n→ d\n50.0 %",
        "b\n→ e\n25.0 %",
    ]
    assert [axes.images[0].get_array().shape for axes in figure.axes[:3]] == [(9, 9, 4), (8, 8), (32, 32, 3)]
    assert figure.axes[1].images[0].get_clim() == (0, 255)  # a dark image stays dark
    assert figures.mistakes([], [], [], []).get_suptitle() == "No mistakes"
    many = figures.mistakes([images[0]] * 40, ["a"] * 40, ["b"] * 40, np.arange(40) / 40)
    assert len(many.axes) == 30 and "97.5 %" in many.axes[0].get_title()


ODD_NAMES = ["猫", "ابن آوى", "कुत्ता", "🐈", "$\\frac{$", "$", "a\nb\t\x07", "_^{}\\", "", "x" * 300]


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path, capsys):
    n, dark = len(ODD_NAMES), np.zeros((8, 8, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for i, figure in enumerate((
            figures.confusion([(i, i, 1) for i in range(n)], ODD_NAMES),
            figures.mistakes([dark] * n, ODD_NAMES, ODD_NAMES[::-1], [0.5] * n),
            figures.curves([{"step": 1, "test/loss": 1.0}], title=" ".join(ODD_NAMES[:5])),
        )):  # fmt: skip
            figures.save(figure, tmp_path / f"{i}.png")
            with Image.open(tmp_path / f"{i}.png") as image:
                assert image.width == 1200
    # No font, whichever are installed, has a private character.
    capsys.readouterr()
    for name, note in [("naïve кот", ""), ("\ue123", "curves.png shows some characters as boxes")]:
        figures.save(figures.curves([{"step": 1, "test/loss": 1.0}], title=name), tmp_path / "curves.png")
        out = capsys.readouterr().out
        assert out.startswith(note) and bool(out) == bool(note)


def test_calibration_draws_accuracy_and_number_of_images_per_bin():
    confidence = np.array([0.95] * 4 + [0.5, 0.52], np.float32)
    figure = figures.calibration(confidence, np.array([True, True, True, False, True, False]))
    top, bottom = figure.axes
    bars = [(round(bar.get_x() * 15), bar.get_height()) for bar in top.patches]
    assert bars == [(7, 0.5), (14, 0.75)]
    assert [bar.get_height() for bar in bottom.patches] == [0] * 7 + [2] + [0] * 6 + [4]
    assert figure.get_suptitle() == "Expected calibration error: 0.1367"  # (4 · 0.2 + 2 · 0.01) / 6


def test_save_writes_a_complete_file_or_leaves_the_old_one(tmp_path):
    file = tmp_path / "mistakes.png"
    file.write_text("old")
    figure = figures.mistakes([], [], [], [])
    figures.save(figure, file)
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width == 1200
    written = file.read_bytes()
    with pytest.raises(UserError, match="nowhere.*No such file or directory"):
        figures.save(figure, tmp_path / "nowhere" / "mistakes.png")
    figure.set_figheight(1e5)
    with pytest.raises(ValueError, match="too large"):
        figures.save(figure, file)
    assert file.read_bytes() == written and list(tmp_path.iterdir()) == [file]


def test_drawing_does_not_import_pyplot(tmp_path):
    code = """
import pathlib, sys
import mlpmixer_flax.inference.figures as figures
assert "matplotlib" not in sys.modules
figure = figures.curves([{"step": 1, "test/loss": 1.0}], title="run")
figures.save(figure, pathlib.Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
