"""Figures of curves and scores: their contents and the places of their parts, read back from the figure."""

import warnings
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from mlpmixer_flax import UserError
from mlpmixer_flax.inference import figures


def drawn(figure):
    """Returns the array of the first image in a figure."""
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def legend(figure):
    """Returns the names in the only legend of a figure."""
    assert not any(axes.get_legend() for axes in figure.axes)
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def points(axes):
    return [line.get_xydata().tolist() for line in axes.lines]


def texts(figure):
    """Yields the title, captions and labels of a figure, as far as they are drawn."""
    yield figure._suptitle
    for axes in figure.axes:
        yield axes.title
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            yield axis.label
            low, high = sorted(axis.get_view_interval())
            for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False):
                if low <= place <= high:
                    yield label


def check_texts(figure):
    """Checks that all texts are inside the figure and do not overlap."""
    with warnings.catch_warnings(action="ignore"):  # about characters that no font has
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts(figure) if text.get_visible() and text.get_text()]
    width, height = figure.bbox.size
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
    for one, other in combinations(boxes, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        up = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 1 or up <= 1, (one, other)


# --- curves

ROWS = [
    {"step": 10, "train/loss": 2.0, "train/accuracy": 0.2, "train/learning_rate": 0.1},
    {"step": 15, "test/loss": 1.5, "test/accuracy": 0.4, "test/accuracy_top5": 0.8},
    {"step": 20, "train/loss": 1.0, "train/accuracy": 0.6, "train/learning_rate": 0.05},
    {"step": 20, "test/loss": 1.25, "test/accuracy": 0.5, "test/accuracy_top5": 0.9},
]


def test_curves_draw_the_values_of_the_rows_and_leave_out_missing_ones():
    figure = figures.curves(ROWS, title="run")
    loss, accuracy, rate = figure.axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, rate)] == ["loss", "accuracy", "learning rate"]
    assert rate.get_xlabel().startswith("step (completed updates)\n")
    # Updates 1 to 10 and 11 to 20; evaluations are at their step.
    assert points(loss) == [[[5.5, 2], [15.5, 1]], [[15, 1.5], [20, 1.25]]]
    assert points(accuracy) == [[[5.5, 0.2], [15.5, 0.6]], [[15, 0.4], [20, 0.5]], [[15, 0.8], [20, 0.9]]]
    assert points(rate) == [[[5.5, 0.1], [15.5, 0.05]]]
    assert legend(figure) == ["train", "test", "test, top 5"]
    assert rate.get_xlim() == (0, pytest.approx(20.4))
    assert figure.get_suptitle() == "run"
    check_texts(figure)
    (only,) = figures.curves([{"step": 1, "test/accuracy": 0.5}], title="run").axes
    assert only.lines[0].get_color() == accuracy.lines[1].get_color()
    with pytest.raises(UserError, match="let the run log"):
        figures.curves([{"step": 1, "images_per_second": 3.0}], title="run")


def test_validation_is_called_so_and_lines_differ_also_without_color():
    renamed = [{key.replace("test/", "validation/"): value for key, value in row.items()} for row in ROWS]
    figure = figures.curves(renamed, title="run")
    assert legend(figure) == ["train", "validation", "validation, top 5"]
    lines = figure.axes[1].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 3
    assert lines[1].get_color() == lines[2].get_color() != lines[0].get_color()


@pytest.mark.parametrize("count", [1, 4, 15])
def test_scores_of_other_sizes_are_thin_lines_of_their_own(count):
    sizes = [16, 24, 48, *range(64, 1000, 32)][:count]
    others = [
        {f"{name}_{px}px": value + px / 1e5 for name, value in row.items() if "test" in name for px in sizes}
        for row in ROWS
    ]
    figure = figures.curves([row | other for row, other in zip(ROWS, others, strict=True)], title="run")
    assert legend(figure) == ["train", "test", "test, top 5", *(f"test, {px} px" for px in sizes)]
    loss, accuracy, _ = figure.axes
    assert points(loss)[0] == [[15, 1.50016], [20, 1.25016]]
    assert points(loss)[count:] == [[[5.5, 2], [15.5, 1]], [[15, 1.5], [20, 1.25]]]  # over the others
    assert points(accuracy)[0] == [[15, 0.40016], [20, 0.50016]] and len(accuracy.lines) == 3 + count
    thin, usual = (
        {line.get_linewidth() for line in lines} for lines in (loss.lines[:count], loss.lines[count:])
    )
    assert max(thin) < min(usual)
    assert len({line.get_color() for line in loss.lines}) == 2 + count
    check_texts(figure)
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert box.y1 < figure.axes[2].xaxis.label.get_window_extent().y0


@pytest.mark.parametrize("last", [1, 3, 17, 30, 50])
def test_a_short_last_window_makes_no_cliff(last):
    ends = [50, 100, 150, 150 + last]
    falling = [1 - update / ends[-1] for update in range(1, ends[-1] + 1)]  # a linear schedule
    rows = [
        {"step": end, "train/learning_rate": np.mean(falling[start:end])}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    (axes,) = figures.curves(rows, title="run").axes
    ((first, *rest),) = points(axes)
    assert len(rest) == (3 if last >= 17 else 2)  # fewer than a third of 50 are joined to the 50 before
    slopes = [(value - first[1]) / (step - first[0]) for step, value in rest]
    np.testing.assert_allclose(slopes, -1 / ends[-1])
    assert rest[-1][0] == (150 + 1 + ends[-1]) / 2 if last >= 17 else (100 + 1 + ends[-1]) / 2


def test_joined_means_have_the_weights_of_their_updates():
    rows = [{"step": step, "train/loss": loss} for step, loss in [(10, 4.0), (20, 2.0), (22, 5.0)]]
    (axes,) = figures.curves(rows, title="run").axes
    assert points(axes) == [[[5.5, 4.0], [16.5, 2.5]]]
    (axes,) = figures.curves(rows[:1], title="run").axes
    assert points(axes) == [[[5.5, 4.0]]]


def test_damaged_steps_that_are_out_of_order_are_drawn():
    rows = [{"step": step, "train/loss": loss} for step, loss in [(10, 4.0), (20, 2.0), (10, 5.0)]]
    (axes,) = figures.curves(rows, title="run").axes
    assert points(axes) == [[[5.5, 5.0], [15.5, 2.0]]]


def test_epochs_are_an_axis_at_the_top_if_their_length_is_known():
    figure = figures.curves(ROWS, title="run", steps_per_epoch=4.0)
    figure.draw_without_rendering()
    (epochs,) = figure.axes[0].child_axes
    assert epochs.get_xlabel() == "epoch"
    np.testing.assert_allclose(epochs.get_xlim(), np.array(figure.axes[0].get_xlim()) / 4)
    step_5, epoch_1_25 = (
        axes.transData.transform([at, 0])[0] for axes, at in [(figure.axes[2], 5), (epochs, 1.25)]
    )
    assert step_5 == pytest.approx(epoch_1_25)
    check_texts(figure)
    assert not figures.curves(ROWS, title="run").axes[0].child_axes


def test_a_single_evaluation_can_be_seen_and_a_long_run_is_a_line():
    loss, *_ = figures.curves(ROWS[:2], title="run").axes
    assert [line.get_markersize() > 0 for line in loss.lines] == [True, True]
    many = [{"step": step, "test/loss": 1 / step} for step in range(1, 100)]
    assert figures.curves(many, title="run").axes[0].lines[0].get_markersize() == 0


@pytest.mark.parametrize("scored", ["test", "validation"])
def test_runs_are_compared_in_the_same_axes_on_the_split_that_was_scored(scored):
    runs = {
        "a": [{"step": 1, "train/loss": 3.0, f"{scored}/accuracy": 0.1}, {"step": 2, "train/loss": 2.0}],
        "b": [{"step": 2, "train/loss": 1.0, f"{scored}/accuracy": 0.7}],
    }
    figure = figures.compare(runs, title="two", steps_per_epoch=2)
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("training loss", f"{scored} accuracy")
    assert points(loss) == [[[1, 3], [2, 2]], [[1.5, 1]]]
    assert points(accuracy) == [[[1, 0.1]], [[2, 0.7]]]
    assert legend(figure) == ["a", "b"] and len(loss.child_axes) == 1
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 2


# --- scores


def test_confusion_shows_shares_of_the_true_class_and_counts():
    counts = [(2, 2, 15), (2, 0, 5), (0, 0, 3), (0, 1, 1)]
    figure = figures.confusion(counts, ["a", "b", "c"], title="runs/a on photos, split test")
    np.testing.assert_array_equal(drawn(figure), [[0.75, 0.25, 0], [np.nan] * 3, [0.25, 0, 0.75]])
    axes, bar = figure.axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "3", (1, 0): "1", (0, 2): "5", (2, 2): "15"}  # (predicted, true)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    title = "runs/a on photos, split test\nConfusion matrix: 75.00 % of 24 images are correct"
    assert figure.get_suptitle() == title
    label = "share of the images of the true class (linear color scale; gray: no images)"
    assert bar.get_ylabel() == label
    assert axes.get_facecolor()[:3] == (0.85,) * 3
    check_texts(figure)
    assert figures.confusion(counts, ["a", "b", "c"]).get_suptitle().startswith("Confusion matrix")


@pytest.mark.parametrize(
    ("n", "named", "counted", "scale", "number"),
    [
        (20, 20, 20, "linear", ""),
        (21, 21, 0, "fourth-root", ""),
        (50, 50, 0, "fourth-root", ""),
        (51, 0, 0, "fourth-root", " (number)"),
        (21843, 0, 0, "fourth-root", " (number, 21 to 22 classes per cell)"),
    ],
)
def test_confusion_of_many_classes_has_another_scale_and_no_names(n, named, counted, scale, number):
    names = [f"class {i}" for i in range(n)]
    figure = figures.confusion([(i, i, 1) for i in range(n)], names)
    np.testing.assert_array_equal(drawn(figure), np.eye(min(n, 1000)))
    axes, bar = figure.axes
    assert axes.get_xlim() == (-0.5, n - 0.5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"predicted class{number}", f"true class{number}")
    check_texts(figure)
    shown = {label.get_text() for label in axes.get_xticklabels()}
    assert len(shown & set(names)) == named and len(axes.texts) == counted
    # The scale is the one that the label names.
    assert bar.get_ylabel() == f"share of the images of the true class ({scale} color scale)"
    assert axes.images[0].norm(1 / 16) == pytest.approx(1 / 16 if scale == "linear" else 1 / 2)
    assert [label.get_text() for label in bar.get_yticklabels()][-1] == "100 %"


LONG = [
    "Straßenbahnhaltestelle außer Betrieb",
    "GREAT WHITE SHARK, MAN-EATER",
    "naïve кот на дереве",
    "猫" * 30,
]


def test_long_names_keep_their_ends_and_do_not_overlap():
    names = [f"{LONG[i % 4]} {i}" for i in range(24)]
    figure = figures.confusion([(i, i, 1) for i in range(24)], names)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(set(labels)) == 24 and all(label.endswith(f" {i}") for i, label in enumerate(labels))
    check_texts(figure)
    wrong = [
        {
            "image": i,
            "file": f"val/{name}/IMG_20240613_12345{i}.jpg",
            "is": name,
            "said": name,
            "confidence": 0.5,
        }
        for i, name in enumerate(names[:12])
    ]
    check_texts(figures.mistakes([np.zeros((9, 16, 3), np.uint8)] * 12, wrong, title="runs/a"))


def mistake(image, *, file=None, **values):
    return {"image": image, "file": file, "is": "a", "said": "b", "confidence": 0.5, **values}


def test_mistakes_are_whole_photos_with_their_files_and_classes():
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 3), (90, 160, 3), (160, 90, 3), (30, 300, 4), (300, 30, 3), (33, 32, 3), (20, 10, 3)]
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    found = [mistake(7 + i, file=f"val/a/IMG_{i}.jpg") for i in range(6)]
    found += [mistake(99, said="f" * 40, confidence=0.999)]
    figure = figures.mistakes(images, found, title="runs/a on photos, split validation")
    check_texts(figure)
    shown = [axes for axes in figure.axes if axes.images]
    for axes, image in zip(shown, images, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
        box = axes.get_window_extent()
        assert box.width / box.height == pytest.approx(image.shape[1] / image.shape[0], rel=0.01)
    captions = [axes.get_title() for axes in shown]
    assert captions[:6] == [f"IMG_{i}.jpg\na\n→ b\n50.0 %" for i in range(6)]
    first, *_, third, last = captions[6].split("\n")
    assert (first, last) == ("image 99", "99.9 %") and third.startswith("→ fff") and "…" in third
    assert figure.get_suptitle().split("\n") == [
        "runs/a on photos, split validation",
        "Mistakes with the highest confidence: true class → predicted class",
    ]


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1, (20, 20, 3)), (2, (20, 60, 3)), (7, (20, 20, 3)), (15, (30, 40, 3)), (30, (20, 60, 3))],
)
def test_mistakes_leave_no_blank_strip(count, shape):
    figure = figures.mistakes(
        [np.zeros(shape, np.uint8)] * count, [mistake(i) for i in range(count)], title="a"
    )
    check_texts(figure)
    empty = len([axes for axes in figure.axes if not axes.images])
    assert empty <= 1  # the place of an eighth mistake
    _, figure_height = figure.bbox.size
    tops = sorted({round(axes.get_window_extent().y1) for axes in figure.axes if axes.images}, reverse=True)
    height = figure.axes[0].get_window_extent().height
    inch = figure.dpi
    # Over each row are four lines of a caption, over the first also two of the title.
    assert figure_height - tops[0] < 1.4 * inch and tops[-1] - height < 0.3 * inch
    assert all(upper - height - lower < 0.95 * inch for upper, lower in zip(tops, tops[1:], strict=False))


def test_without_mistakes_the_figure_is_only_its_title():
    figure = figures.mistakes([], [], title="runs/a on digits, split test")
    assert figure.get_suptitle() == "runs/a on digits, split test\nNo mistakes"
    assert not figure.axes and figure.get_figheight() < 1


def test_calibration_draws_accuracy_and_number_of_images_per_bin():
    confidence = np.array([0.95] * 4 + [0.5, 0.52], np.float32)
    correct = np.array([True, True, True, False, True, False])
    figure = figures.calibration(confidence, correct, title="runs/a on digits, split test")
    top, bottom = figure.axes
    bars = [(round((bar.get_x() + bar.get_width() / 2) * 15 - 0.5), bar.get_height()) for bar in top.patches]
    assert bars == [(7, 0.5), (14, 0.75)]
    assert [bar.get_height() for bar in bottom.patches] == [0] * 7 + [2] + [0] * 6 + [4]
    assert [text.get_text() for text in bottom.texts if text.get_text()] == ["2", "4"]
    assert figure.get_suptitle().split("\n") == [
        "runs/a on digits, split test",
        "Expected calibration error: 0.1367 (15 bins of confidence)",  # (4 · 0.2 + 2 · 0.01) / 6
    ]
    check_texts(figure)
    assert {text.get_text()[-1] for text in top.get_yticklabels()} == {"%"}


def test_bins_with_few_images_are_thin_and_their_accuracy_is_uncertain():
    counts = {2: 1, 7: 25, 14: 400}  # bin -> images, of which a fifth are wrong
    confidence = np.concatenate([np.full(n, (number + 0.5) / 15) for number, n in counts.items()])
    correct = np.concatenate([np.arange(n) >= n // 5 for n in counts.values()])
    top, _ = figures.calibration(confidence, correct).axes
    widths = [bar.get_width() for bar in top.patches]
    assert widths[-1] == pytest.approx(1 / 15, rel=0.05)
    np.testing.assert_allclose(np.array(widths) / widths[-1], [1 / 20, 1 / 4, 1])
    (intervals,) = top.collections
    for (low, high), n in zip(intervals.get_segments(), counts.values(), strict=True):
        expected = binomtest(n - n // 5, n).proportion_ci(method="wilson")
        np.testing.assert_allclose((low[1], high[1]), expected, atol=1e-4)
