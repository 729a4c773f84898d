"""Tests the table of published figures, the results that were measured, and the page that shows both."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from copied_reproduce import BENCHMARKS, copied_program, imported

from mlpmixer_flax.config import CHANGE_NO_UPDATE
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED


@pytest.fixture
def program(tmp_path, monkeypatch):
    return copied_program(tmp_path, monkeypatch)


# --- the table


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mnist", 213_626),
        ("nano_cifar10", 671_882),
        ("omihub777_nano", 671_882),
        ("omihub777", 1_132_170),
        ("model_zoo", 6_782_858 + 1_024),
        ("cifar10", 6_533_642),
        ("mdmlp", 298_602),
        ("mdmlp_mixer", 17_110_026),
        ("paper_b16", 59_880_472),
        ("paper_l16", 208_196_168),
    ],
)
def test_a_row_has_as_many_parameters_as_it_says(program, name, count):
    row = program.ROWS[name]
    config = load_config(row.config, row.changes)
    classes, channels = (1000 if "paper" in name else 10), (1 if name == "mnist" else 3)
    sizes = {**config.model.to_dict(), "gelu": "tanh", "num_blocks": 2}
    px = config.preprocess.image_size_px

    def counted(blocks):
        model = MlpMixer(num_classes=classes, **{**sizes, "num_blocks": blocks})
        images = np.zeros((1, px, px, channels), np.float32)
        return sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), images))
        )

    # Tracing all blocks of Mixer-L takes seconds.
    assert counted(1) + (config.model.num_blocks - 1) * (counted(2) - counted(1)) == count
    if name in ("omihub777_nano", "omihub777", "model_zoo", "cifar10", "mdmlp"):
        assert f"{count:,}" in row.remarks


def test_each_row_names_a_config_or_weights_and_says_where_its_figure_is_from(program):
    for name, row in program.ROWS.items():
        assert bool(row.config) != bool(row.weights), name
        assert row.weights or load_config(row.config, row.changes), name
        assert "https://" in row.source or "did not find its address" in row.source or name == "digits", name
        assert len(name) <= 20 and row.accuracy > 50 - (name == "digits"), name


def test_the_page_is_as_the_program_writes_it(monkeypatch):
    page = imported("reproduction_page", BENCHMARKS, monkeypatch)
    assert page.PAGE.read_text() == page.page(page.read_measured()), (
        "run python benchmarks/reproduction_page.py"
    )


def test_a_row_that_is_not_measured_says_why_and_the_weights_without_a_row_are_named(monkeypatch):
    page = imported("reproduction_page", BENCHMARKS, monkeypatch)
    text = page.page([])
    cells = {
        line.split(" | ")[0].strip("| `"): line.split(" | ")[3] for line in text.splitlines() if "| `" in line
    }
    assert cells["nano_cifar10"] == "not yet: needs about 4 hours on 2 cores, and was not run to its end"
    assert cells["mdmlp"] == "not yet: no GPU"
    assert cells["paper_b16_21k"] == "not yet: no ImageNet, no weights, no GPU"
    assert cells["timm_goog_b16"] == "not yet: no ImageNet, no weights"
    assert len(cells) == len(page.ROWS) and all(len(cell) > len("not yet: ") for cell in cells.values())
    (about_timm,) = (line for line in text.splitlines() if line.startswith("timm publishes"))
    named = [name for name in PUBLISHED if f"`{name}`" in about_timm]
    assert len(named) == 3 and all("goog_in21k" in name or "miil_in21k" in name for name in named)
    assert "11,221 or 21,843" in about_timm


def test_results_that_were_entered_by_hand_say_so_and_belong_to_the_present_rows(monkeypatch):
    page = imported("reproduction_page", BENCHMARKS, monkeypatch)
    for result in page.read_measured():
        assert result.get("commit") or "entered by hand" in result["note"], result
        assert page.is_current(result), f"{result['row']} has changed: measure it again"
        assert result["minutes"] > 0 or page.ROWS[result["row"]].weights


def test_help_fits_80_columns():
    command = [sys.executable, BENCHMARKS / "reproduction_page.py", "--help"]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert max(map(len, said.stdout.splitlines())) <= 80


# --- the results


def form_of(program, name):
    return sys.modules["measured"].form_of(program.ROWS[name])


def result(name, **values):
    """Returns a line of measured.jsonl."""
    about = {"hardware": "a machine", "versions": "a version", "date": "today", "data": "", "first": 0.0}
    return {"row": name, "seed": 0, "accuracy": 50.0, "minutes": 3.2, **about, **values}


def test_a_result_takes_the_place_of_an_earlier_one_and_the_page_shows_mean_and_spread(program, tmp_path):
    for seed, accuracy in [(1, 60.0), (0, 10.0), (0, 50.0), (2, 55.0)]:
        program.record(result("cifar10", seed=seed, accuracy=accuracy, data="JPEG copy"))
    lines = (tmp_path / "docs" / "reproduction.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| `cifar10`"))
    assert "| 90.1 | 55.00 ± 5.00 (n = 3) | cifar10, a GPU |" in line
    assert [line.partition(", ")[0] for line in lines if line.startswith("- Seed")] == [
        f"- Seed {seed}: {accuracy}.00 % on a JPEG copy" for seed, accuracy in enumerate((50, 60, 55))
    ]


def test_a_result_of_an_earlier_form_of_its_row_says_so_and_counts_only_alone(program, tmp_path):
    def page():
        return (tmp_path / "docs" / "reproduction.md").read_text()

    program.record(result("digits", seed=0, accuracy=50.0, form=form_of(program, "digits"), commit="1a2b3c4"))
    assert "| 50.00 (n = 1) | digits |" in page() and "earlier form" not in page()
    assert "a version, commit 1a2b3c4; today\n" in page()
    row = program.ROWS["digits"]
    program.ROWS["digits"] = dataclasses.replace(row, changes={**row.changes, "total_epochs": 6.0})
    program.record(result("mnist", note="entered by hand"))  # without a form, as in old files
    assert "| 50.00 (n = 1), earlier form | digits |" in page()
    assert "; today; measured with an earlier form of this row\n" in page()
    assert "; today; entered by hand\n" in page()
    program.record(result("digits", seed=1, accuracy=80.0, form=form_of(program, "digits")))
    assert "| 80.00 (n = 1) | digits |" in page() and page().count("an earlier form of this row") == 1


def test_keys_that_change_no_result_do_not_change_the_form(program):
    form, row = form_of(program, "digits"), program.ROWS["digits"]
    for key, value in {"num_workers": 3, "accumulation_steps": 2, "model.num_blocks": 1}.items():
        program.ROWS["digits"] = dataclasses.replace(row, changes={**row.changes, key: value})
        assert form_of(program, "digits") == form
    assert {*sys.modules["measured"].CHANGE_NO_RESULT} < {*CHANGE_NO_UPDATE}


@pytest.mark.parametrize("line", ["{", '{"row": "digits"}', "[]", "\x00", ""])
def test_a_damaged_line_of_the_results_is_named_before_anything_runs(program, line, tmp_path, capsys):
    file = tmp_path / "benchmarks" / "measured.jsonl"
    before = json.dumps(result("digits")) + "\n" + line + "\n"
    file.write_text(before)
    assert program.main(["digits"]) == 2
    assert f"error: {file}, line 2 cannot be read (" in capsys.readouterr().err
    assert file.read_text() == before and not (tmp_path / "runs").exists()
