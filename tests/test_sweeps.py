"""The recipes for several seeds and for a search, run as docs/recipes.md shows them, with smaller numbers."""

import re
from pathlib import Path

import pytest

import mlpmixer_flax as mf
from mlpmixer_flax.training.report import read_metrics

TEXT = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
# A model that compiles in a second
SMALL = {
    "model.hidden_dim": 8,
    "model.channels_mlp_dim": 8,
    "model.tokens_mlp_dim": 8,
    "model.num_blocks": 1,
    "augment.mixup_alpha": 0.0,
    "eval_every_steps": 3,
}


def code_of(section, smaller):
    """Returns the code of a section; each text, which it must have, is replaced by another, and the model is SMALL."""
    code = re.search(r"```python\n(.*?)```", TEXT.partition(f"## {section}\n")[2], re.DOTALL)[1]
    for before, after in smaller.items():
        assert before in code
        code = code.replace(before, after)
    return code


@pytest.mark.slow
def test_seeds_in_a_loop_are_a_table_with_mean_and_deviation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    smaller = {
        '"total_epochs": 10.0': '"total_steps": 3',
        "range(3)": "range(2)",
        "**changes": "**SMALL, **changes",
        ', "warmup 5": {"schedule.warmup_epochs": 5.0}}': "}",  # the first setting alone
    }
    exec(compile(code_of("Several seeds", smaller), "recipes.md", "exec"), {"SMALL": SMALL})
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| warmup ")]
    mean, deviation, first, second = map(float, re.findall(r"\d+\.\d+", row))
    assert mean == pytest.approx((first + second) / 2, abs=0.01)
    assert deviation == pytest.approx(abs(first - second) / 2**0.5, abs=0.01)
    assert {run.name for run in Path("runs").iterdir()} == {"warmup 0, seed 0", "warmup 0, seed 1"}


@pytest.mark.slow
def test_optuna_searches_and_prunes(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    monkeypatch.chdir(tmp_path)
    smaller = {
        '"total_epochs": 10.0': '"total_steps": 9',
        "MedianPruner(n_startup_trials=4, n_warmup_steps=40)": "ThresholdPruner(lower=2.0, n_warmup_steps=4)",
        "n_trials=20": "n_trials=2",
        "changes)": "SMALL | changes)",
    }
    code = code_of("Search for good values with Optuna", smaller)
    names = {"SMALL": SMALL}
    with pytest.raises(
        ValueError, match="No trials are completed yet"
    ):  # all are pruned, at the second evaluation
        exec(compile(code, "recipes.md", "exec"), names)
    trials = names["study"].trials
    assert [trial.state for trial in trials] == [optuna.trial.TrialState.PRUNED] * 2
    for trial in trials:
        rows = read_metrics(Path(f"runs/search/{trial.number}/metrics.jsonl"))
        scores = {row["step"]: row["validation/accuracy"] for row in rows if "validation/accuracy" in row}
        assert trial.intermediate_values == scores and list(scores) == [3, 6]


def test_on_evaluation_gets_the_scores_of_this_call_and_may_end_the_run(tmp_path):
    config = mf.load_config("digits.py", SMALL | {"total_steps": 6, "save_every_steps": 2})
    seen = []

    def stop(scores):
        seen.append(scores)
        if scores["step"] == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="^enough$"):
        mf.fit(config, tmp_path / "run", on_evaluation=stop)
    assert mf.fit(config, tmp_path / "run", on_evaluation=seen.append) == seen[-1]
    assert [scores["step"] for scores in seen] == [3, 3, 6]  # step 2 was saved, so step 3 is done again
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "test/accuracy" in row]
    assert rows == seen[1:]
