"""Scores computed by hand, classes matched by name, and the table of classes in its columns."""

import numpy as np
import pytest
from rich.cells import cell_len
from sklearn import metrics

from mlpmixer_flax import UserError
from mlpmixer_flax.evaluate import as_table
from mlpmixer_flax.inference import scores
from mlpmixer_flax.inference.classes import imagenet_names, in_words, match_classes
from mlpmixer_flax.text import pad

ROWS = {
    "label": np.array([0, 0, 0, 0, 1, 3]),
    "best": np.array([(0, 1, 2), (2, 0, 1), (1, 2, 3), (1, 2, 3), (1, 0, 2), (0, 2, 1)]),
    "confidence": np.array([0.9, 0.8, 0.7, 0.4, 0.6, 0.95]),
    "loss": np.array([0.1, 1.6, 2.0, 3.0, 0.5, 4.8]),
}
NAMES = ["ant", "bee", "cat", "dog"]


def test_measures_are_means_over_all_images():
    found = scores.measure(ROWS)
    # Each confidence is in another bin.
    error = ((1 - 0.9) + 0.8 + 0.7 + 0.4 + (1 - 0.6) + 0.95) / 6
    # The classes with images have 1 of 4, 1 of 1 and 0 of 1 right.
    balanced = (0.25 + 1 + 0) / 3
    expected = {
        "accuracy": 2 / 6,
        "balanced_accuracy": balanced,
        "accuracy_top5": 3 / 6,
        "loss": 2.0,
        "calibration_error": error,
    }
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.9, 0.9], [True, True], 0.1),
        ([0.9, 0.9], [True, False], 0.4),
        ([0.95, 0.95, 0.55, 0.55], [True, True, True, False], 0.05),  # the error is 0.05 in both bins
        ([0.95, 0.95, 0.95, 0.55], [True, True, True, False], 0.175),  # (3 · 0.05 + 0.55) / 4
        ([0.61, 0.65], [True, False], 0.13),  # both in the bin (9/15, 10/15]: the errors partly cancel
        ([0.59, 0.61], [True, False], 0.51),  # on both sides of 9/15: (0.41 + 0.61) / 2
        ([0.6, 0.61], [True, False], 0.505),  # 9/15 belongs to the lower bin
        ([0.0, 1.0, 1.0000001], [False, True, True], 0.0),  # float32 may round to more than 1
    ],
)
def test_calibration_error_equals_that_computed_by_hand(confidence, correct, expected):
    error = scores.calibration_error(np.array(confidence), np.array(correct))
    assert error == pytest.approx(expected, abs=1e-7)


def test_each_class_has_its_scores_and_the_class_it_is_most_often_mistaken_for():
    keys = ("class", "name", "images", "precision", "recall", "f1", "taken_for", "times")
    rows = [
        (0, "ant", 4, 1 / 2, 1 / 4, 2 / 6, "bee", 2),
        (1, "bee", 1, 1 / 3, 1.0, 2 / 4, None, 0),
        (2, "cat", 0, 0.0, None, 0.0, None, 0),
        (3, "dog", 1, None, 0.0, 0.0, "ant", 1),
    ]
    assert scores.per_class(ROWS, NAMES) == [dict(zip(keys, row, strict=True)) for row in rows]
    assert scores.confusions(ROWS)[0] == (0, 1, 2)
    assert sorted(scores.confusions(ROWS)) == [(0, 0, 1), (0, 1, 2), (0, 2, 1), (1, 1, 1), (3, 0, 1)]


def test_the_most_confident_mistakes_come_first():
    assert scores.confident_mistakes(ROWS).tolist() == [5, 1, 2, 3]
    right = {name: values[[0, 4]] for name, values in ROWS.items()}
    assert scores.confident_mistakes(right).tolist() == []


def test_scores_per_class_equal_those_of_scikit_learn():
    random = np.random.default_rng(0)
    true, said = (
        random.integers(0, 6, 300),
        random.integers(0, 7, 300),
    )  # class 6 has no image, 7 is never said
    true[:4] = 7
    rows = {"label": true, "best": said[:, None], "confidence": np.ones(300), "loss": np.ones(300)}
    found = scores.per_class(rows, [str(number) for number in range(8)])
    theirs = metrics.precision_recall_fscore_support(true, said, labels=range(8), zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1", "images"), theirs, strict=True):
        ours = [np.nan if row[name] is None else row[name] for row in found]
        if name == "f1":  # ours is 0 where it is 0 / 0 of one of its parts only
            ours, values = np.nan_to_num(ours), np.nan_to_num(values)
        np.testing.assert_allclose(ours, values, err_msg=name)
    balanced = metrics.recall_score(true, said, labels=[0, 1, 2, 3, 4, 5, 7], average="macro")
    assert scores.measure(rows)["balanced_accuracy"] == pytest.approx(balanced)


def test_classes_are_matched_by_name_and_without_names_by_number_with_a_note(capsys):
    assert match_classes(["dog", "ant", "cat", "bee"], NAMES).tolist() == [3, 0, 2, 1]
    assert match_classes(["cat", "ant"], NAMES).tolist() == [2, 0]
    assert capsys.readouterr().out == ""
    numbers = ["0", "1", "2", "3"]
    for theirs, ours in [(numbers, NAMES), (NAMES, numbers)]:
        assert match_classes(theirs, ours).tolist() == [0, 1, 2, 3]
        assert "matched by number" in capsys.readouterr().out
        # The numbers of a folder's classes mean nothing.
        with pytest.raises(UserError, match="the model has no class named '.*, the model 4 such as"):
            match_classes(theirs, ours, numbered=False)
    with pytest.raises(UserError) as error:
        match_classes(["a b " * 9999], NAMES)
    assert len(str(error.value)) < 500
    # A folder sorts numbers as text; against the numbers of a dataset they are names.
    theirs = sorted(str(i) for i in range(12))
    assert match_classes(theirs, [str(i) for i in range(12)]).tolist() == [int(name) for name in theirs]


def test_classes_of_imagenet_are_matched_by_wordnet_number():
    names = imagenet_names(1000)
    assert len(set(names)) == 1000  # even though a crane is a bird and a machine
    cranes = ["crane (n02012849)", "crane (n03126707)"]
    assert in_words(["n01440764", "n02012849", "n03126707", "cat"]) == [names[0], *cranes, "cat"]
    assert match_classes(names, names).tolist() == list(range(1000))
    assert match_classes(in_words(["n03126707", "n01440764"]), names).tolist() == [517, 0]


def test_other_classes_are_refused():
    message = "the model has no class named '0', '1', '2'; the dataset has 10 classes, the model 4 such as 'ant', .*: choose another"
    with pytest.raises(UserError, match=message):
        match_classes([str(i) for i in range(10)], NAMES)
    twice = ["crane", "crane", "tench"]
    assert match_classes(twice, twice).tolist() == [0, 1, 2]
    with pytest.raises(
        UserError,
        match="the model has several classes named 'crane', so the classes of the dataset cannot be matched",
    ):
        match_classes(["crane", "tench"], twice)
    with pytest.raises(
        UserError, match="the model has no class named 'eel'; the dataset has 4 classes, the model 4"
    ):
        match_classes(["ant", "bee", "cat", "eel"], NAMES)


def test_few_classes_are_all_listed_and_of_many_the_worst_and_the_best():
    few = as_table(scores.per_class(ROWS, NAMES)).splitlines()
    assert [line.split() for line in few[1:]] == [
        ["ant", "4", "50.0%", "25.0%", "33.3%", "bee", "(2)"],
        ["bee", "1", "33.3%", "100.0%", "50.0%"],
        ["dog", "1", "-", "0.0%", "0.0%", "ant", "(1)"],
    ]
    many = [
        {
            **{"name": f"{i:03}", "images": 1000, "recall": (i * 7 % 100) / 100},
            **{"precision": 1.0, "f1": 1.0, "taken_for": "x", "times": 1},
        }
        for i in range(100)
    ]
    table = as_table(many).splitlines()
    ends = [line.split()[3] for line in table if "1,000" in line]
    assert ends == [f"{i}.0%" for i in [*range(10), *range(99, 89, -1)]]


@pytest.mark.parametrize(
    "name",
    ["杜鹃花" * 12, "Ka\u0308fer " * 9, "great white shark, white shark, man-eater", "\x1b[31mred\n" * 9],
)
def test_names_in_any_script_stay_in_the_columns_of_the_table(name):
    third = dict.fromkeys(("precision", "recall", "f1"), 1 / 3)
    row = {"name": name, "images": 12345, **third, "taken_for": name, "times": 1234}
    head, line = as_table([row]).split("\n")
    assert cell_len(head) <= 80 and cell_len(line) <= 80 and "\x1b" not in line
    assert cell_len(pad(name, 22)) == 22 and line.startswith(pad(name, 22) + "  12,345")
    assert line.endswith(" (1,234)")
