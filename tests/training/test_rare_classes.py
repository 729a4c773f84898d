"""Follows docs/labels.md with photos of which some classes are rare: weights, the best checkpoint, early stopping."""

import json
import re
import shlex

import numpy as np
import pytest
from documented import commands_below, run, words_of
from PIL import Image
from several_processes import CHANGES, arguments, finish, start_all

from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.rundir import saved_steps

# A tiny model instead of the one that suits photos; a learning rate with which the scores soon go up and down.
SMALL = [
    *("--config=configs/digits.py", "--config.model.num_blocks=1", "--config.model.hidden_dim=16"),
    *(
        "--config.model.channels_mlp_dim=16",
        "--config.augment.mixup_alpha=0",
        "--config.augment.cutmix_alpha=0",
    ),
    *("--config.optimizer.learning_rate=0.05", "--config.eval_every_steps=2", "--config.batch_size=16"),
]


def follow(command, *more):
    """Runs a command of the page; training with a small model."""
    program, arguments = words_of(command)
    if program == "train":
        arguments = [*SMALL, *arguments, *more]
    assert run(program, arguments) == 0, shlex.join(arguments)


def write_digits(root, counts):
    """Writes images of each digit as root/<digit>/*.png, so many as `counts` says."""
    examples = open_examples("digits", "train")
    for digit, count in counts.items():
        for row in np.flatnonzero(examples.labels == int(digit))[:count]:
            file = root / digit / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(examples.images[row, :, :, 0]).save(file)


def evaluations(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "validation/loss" in row}


@pytest.mark.slow
def test_a_run_with_rare_classes_stops_early_and_keeps_its_best_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "photos", {"1": 80, "4": 40, "8": 8})
    train, evaluate = commands_below("labels.md", "Rare classes")
    follow(train)
    said, workdir = capsys.readouterr().out, tmp_path / "runs" / "rare"
    assert re.search(
        r"^class weights in the training loss: 8: \d\.\d+, 4: .*, 1: 0\.\d+$", said, re.MULTILINE
    )
    assert re.search(r"validation accuracy 0\.\d+, balanced accuracy 0\.\d+, loss", said)

    scores = {step: row["validation/balanced_accuracy"] for step, row in evaluations(workdir).items()}
    first = min(scores, key=lambda step: (-scores[step], step))
    (stop,) = re.findall(r"stopped early at step (\d+): the last 5 eval.* no better balanced_accuracy", said)
    assert int(stop) == max(scores) == max(saved_steps(workdir)) == first + 2 * 5
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert any(row["step"] == max(scores) and "train/loss" in row for row in rows)  # the end is logged
    best = max(scores, key=lambda step: (scores[step], step))
    assert f"best: validation balanced accuracy {scores[best]:.2%} at step {best};" in said
    assert read_weights(workdir, "best")[0] == best
    assert f"done: validation balanced accuracy {scores[int(stop)]:.2%} after {stop} steps" in said

    follow(evaluate)
    said = capsys.readouterr().out
    assert f"(validation balanced accuracy {scores[best]:.2%})" in said
    found = json.loads((workdir / "evaluation" / "scores.json").read_text())
    assert found["balanced_accuracy"] == pytest.approx(scores[best])
    assert re.search(rf"^balanced accuracy +{scores[best]:.2%}$", said, re.MULTILINE)

    # The same command again does nothing; a greater value continues the run, to the next early stop.
    follow(train)
    assert f"stopped early at step {stop}:" in capsys.readouterr().out
    assert list(evaluations(workdir)) == list(scores)
    follow(train, "--config.early_stopping_evals=7")
    assert "continuing with early_stopping_evals=7 (was 5)" in capsys.readouterr().out
    assert len(evaluations(workdir)) >= len(scores) + 2


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_as_one(tmp_path):
    write_digits(tmp_path / "photos", {"1": 80, "4": 40, "8": 8})
    changes = CHANGES | {"eval_every_steps": 2, "class_weights": "balanced", "early_stopping_evals": 3}
    changes |= {"dataset": f"folder:{tmp_path / 'photos'}", "best_by": "loss", "optimizer.learning_rate": 0.3}
    for count in (1, 2):
        options = [*arguments(changes), f"--workdir={tmp_path / str(count)}"]
        environment = {1: lambda index: {"JAX_NUM_CPU_DEVICES": "2"}, 2: None}[count]
        statuses, texts, errors = finish(start_all(count, "train", *options, environment=environment))
        assert statuses == [0] * count and "stopped early at step" in texts[0], errors
    one, two = (evaluations(tmp_path / str(count)) for count in (1, 2))
    assert one.keys() == two.keys()
    for step, row in one.items():
        assert two[step] == pytest.approx(row, rel=1e-3)
