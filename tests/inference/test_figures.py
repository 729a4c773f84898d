"""Figures: what they show, read back from what is drawn; and the numbers behind them, by hand."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.inference import figures


def waves(frequencies, shape, *, phase=0.3):
    """Maps (n, *shape) of (cycles down, cycles across)."""
    down, across = np.meshgrid(*(np.arange(size) / size for size in shape), indexing="ij")
    return np.stack([np.cos(2 * np.pi * (a * down + b * across) + phase) for a, b in frequencies])


def drawn(figure):
    """The array of the first image in a figure; a sheet's gaps are NaN."""
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def test_frequency_of_a_wave_is_its_own_whatever_its_size_and_phase():
    frequencies, shape = [(0, 0), (1, 0), (0, 1), (2, 3), (4, 6)], (8, 12)
    expected = [np.hypot(a / 8, b / 12) for a, b in frequencies]
    for scale, phase in [(1, 0.3), (1e-20, 0.3), (100, 1.2)]:
        found = figures.spatial_frequency(scale * waves(frequencies, shape, phase=phase))
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert figures.spatial_frequency(np.zeros((1, 4, 4))) == [0]


def test_frequency_of_a_sum_is_weighted_by_power_over_all_channels():
    low, high = waves([(1, 0), (3, 0)], (8, 8))
    for mixed in (low + 2 * high, np.stack([low, 2 * high], axis=-1)):
        assert figures.spatial_frequency(mixed[None]) == pytest.approx((1 / 8 + 4 * 3 / 8) / 5)


def test_planted_opposites_are_found_at_any_scale_and_each_unit_is_in_one_pair():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(20, 49))
    negatives = -half * rng.uniform(0.1, 10, size=(20, 1)) + 0.05 * rng.normal(size=(20, 49))
    order = rng.permutation(40)
    pairs = order[figures.opposites(np.concatenate([half, negatives])[order])]
    assert sorted(map(sorted, pairs.tolist())) == [[i, i + 20] for i in range(20)]


def test_the_most_opposed_pair_is_taken_first_and_an_odd_unit_is_left():
    degrees = np.radians([0, 175, 180, 90, 80])
    pairs = figures.opposites(np.stack([np.cos(degrees), np.sin(degrees)], axis=1))
    assert pairs.tolist() == [[0, 2], [1, 4]]  # 180 and 95 degrees apart; the unit at 90 is left


def test_token_mixing_draws_pairs_of_opposites_from_low_to_high_frequency():
    frequencies = [(2, 1), (0, 0), (3, 2), (0, 1)]
    maps = waves(frequencies, (6, 4))
    kernel = np.concatenate([maps, -maps / 2]).reshape(8, 24).T  # in our layout: (tokens, units)
    figure = figures.token_mixing(kernel.astype(np.float32), grid=(6, 4), title="block 0")
    sheet = drawn(figure)
    assert sheet.shape == (60, 4 * (40 + 4 + 40) + 3 * 10)
    for i, which in enumerate([1, 3, 0, 2]):
        first, second = sheet[::10, 94 * i :][:, :40:10], sheet[::10, 94 * i + 44 :][:, :40:10]
        whole = maps[which] / abs(maps[which]).max()
        assert np.isnan(sheet[:, 94 * i + 40 : 94 * i + 44]).all()
        np.testing.assert_allclose(first, whole, atol=1e-6)
        np.testing.assert_allclose(second, -whole / 2, atol=1e-6)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "0.00"
    assert "4 of 4 pairs" in figure.axes[0].get_xlabel()
    assert figure.axes[0].images[0].get_clim() == (-1, 1)


def test_many_units_are_thinned_out_evenly_and_one_alone_is_refused():
    kernel = np.random.default_rng(0).normal(size=(16, 512))
    figure = figures.token_mixing(kernel, grid=(4, 4), title="")
    assert "96 of 256 pairs" in figure.axes[0].get_xlabel()
    labels = [float(label.get_text()) for label in figure.axes[0].get_yticklabels()]
    frequency = figures.spatial_frequency(kernel.T.reshape(-1, 4, 4))
    assert len(labels) == 12 and labels == sorted(labels)
    assert labels[0] < np.quantile(frequency, 0.05) and labels[-1] > np.quantile(frequency, 0.8)
    with pytest.raises(UserError, match="tokens_mlp_dim=1"):
        figures.token_mixing(kernel[:, :1], grid=(4, 4), title="")


def test_stem_draws_each_kernel_in_its_own_range_around_grey_by_frequency():
    kernel = np.zeros((2, 2, 3, 4), np.float32)
    kernel[0, 0, :, 0] = kernel[1, 1, :, 0] = 7  # white and grey, as a chessboard
    kernel[0, :, 0, 1] = 1e-3  # a red row
    kernel[:, :, 2, 2] = -20  # no blue anywhere; the last one is empty
    sheet = drawn(figures.stem(kernel, title="stem"))
    assert sheet.shape == (130, 130, 3)  # each 60 px, with 10 px between them
    corners = [sheet[y : y + 60 : 30, x : x + 60 : 30].tolist() for y in (0, 70) for x in (0, 70)]
    grey, white, red, yellowish = [0.5] * 3, [1.0] * 3, [1.0, 0.5, 0.5], [0.5, 0.5, 0.0]
    rows = [[red, red], [grey, grey]]
    board = [[white, grey], [grey, white]]
    assert corners == [[[yellowish] * 2] * 2, [[grey] * 2] * 2, rows, board]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_stem_of_any_image_is_drawn_in_red_green_and_blue(channels):
    kernel = np.random.default_rng(0).normal(size=(3, 5, channels, 300))
    figure = figures.stem(kernel, title="stem")
    sheet = drawn(figure)
    assert sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert "256 of 300 kernels" in figure.axes[0].get_xlabel()
    assert (sheet[..., 0] == sheet[..., 1]).all() == (channels == 1)


def test_curves_draw_what_the_rows_hold_and_leave_out_what_they_lack():
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


def test_confusion_is_of_the_true_class_and_says_counts():
    figure = figures.confusion([(2, 2, 15), (2, 0, 5), (0, 0, 3), (0, 1, 1)], ["a", "b", "c"])
    np.testing.assert_array_equal(drawn(figure), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]])
    axes = figure.axes[0]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "3", (1, 0): "1", (0, 2): "5", (2, 2): "15"}  # (predicted, true)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert figure.get_suptitle() == "Confusion of classes: 75.00 % of 24 images are right"


@pytest.mark.parametrize(("n", "named", "counted"), [(20, 20, 20), (21, 21, 0), (50, 50, 0), (21843, 0, 0)])
def test_confusion_of_many_classes_drops_counts_then_names(n, named, counted, tmp_path):
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
        f"is c\nsaid {shortened}\nwith 99.9 %",
        "is a\nsaid d\nwith 50.0 %",
        "is b\nsaid e\nwith 25.0 %",
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
    # Whatever fonts there are: of a private character none has the shape.
    capsys.readouterr()
    for name, said in [("naïve кот", ""), ("\ue123", "curves.png: a character that no font has")]:
        figures.save(figures.curves([{"step": 1, "test/loss": 1.0}], title=name), tmp_path / "curves.png")
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)


def test_calibration_draws_the_accuracy_and_the_number_of_each_bin():
    confidence = np.array([0.95] * 4 + [0.5, 0.52], np.float32)
    figure = figures.calibration(confidence, np.array([True, True, True, False, True, False]))
    top, bottom = figure.axes
    bars = [(round(bar.get_x() * 15), bar.get_height()) for bar in top.patches]
    assert bars == [(7, 0.5), (14, 0.75)]
    assert [bar.get_height() for bar in bottom.patches] == [0] * 7 + [2] + [0] * 6 + [4]
    assert figure.get_suptitle() == "Expected calibration error: 0.1367"  # (4 · 0.2 + 2 · 0.01) / 6


def test_save_replaces_a_picture_whole_or_leaves_the_old_one(tmp_path):
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


def test_drawing_starts_no_pyplot(tmp_path):
    code = """
import pathlib, sys
import mlpmixer_flax.inference.figures as figures
assert "matplotlib" not in sys.modules
figure = figures.curves([{"step": 1, "test/loss": 1.0}], title="run")
figures.save(figure, pathlib.Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "curves.png")], check=True)
