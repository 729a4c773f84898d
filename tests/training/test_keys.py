"""Tests which key or option is suggested for the names that people type."""

import pytest

from mlpmixer_flax.config import flatten, get_config
from mlpmixer_flax.summary import main as summary
from mlpmixer_flax.train import main as train
from mlpmixer_flax.training.keys import _ALIASES, _OTHER_NAMES, find_key, suggest_option

KEYS = list(flatten(get_config()))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lr", "optimizer.learning_rate"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("learning-rate", "optimizer.learning_rate"),
        ("epochs", "total_epochs"),
        ("num_epochs", "total_epochs"),
        ("steps", "total_steps"),
        ("image_size", "preprocess.image_size_px"),
        ("preprocess.image_size", "preprocess.image_size_px"),
        ("img-size", "preprocess.image_size_px"),
        ("wd", "optimizer.weight_decay"),
        ("weight_decay", "optimizer.weight_decay"),
        ("bs", "batch_size"),
        ("batch", "batch_size"),
        ("BATCH_SIZE", "batch_size"),
        ("batch_sze", "batch_size"),
        ("workers", "num_workers"),
        ("patch_size", "model.patches.size"),
        ("model.depth", "model.num_blocks"),
        ("dropout", "model.dropout_rate"),
        ("warmup_steps", "schedule.warmup_steps"),
        ("val_split", "test_split"),
        ("pretrained", "init_from"),
        ("modle.remat", "model.remat"),
        ("seed", "seed"),
        ("qqq", None),
        ("", None),
    ],
)
def test_the_key_that_is_meant_is_found(name, key):
    assert find_key(name, KEYS) == key


def test_every_other_name_belongs_to_one_existing_key():
    assert _OTHER_NAMES.keys() <= set(KEYS)
    assert len(_ALIASES) == sum(len(names.split()) for names in _OTHER_NAMES.values())
    assert not set(_ALIASES) & set(KEYS)


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("--lr=0.1", "did you mean --config.optimizer.learning_rate=0.1?"),
        ("--lr", "did you mean --config.optimizer.learning_rate=VALUE?"),
        ("--batch-size=8", "did you mean --config.batch_size=8?"),
        ("-epochs=3", "did you mean --config.total_epochs=3?"),
        ("--config.epochs", "did you mean --config.total_epochs=VALUE?"),
        ("--output_dir=runs/a", "did you mean --workdir=runs/a?"),
        ("--qqq=1", "to change a key of the config, give --config.KEY=VALUE"),
        ("photos/", "to change a key of the config, give --config.KEY=VALUE"),
    ],
)
def test_an_unknown_option_is_answered_with_the_right_one(argument, suggestion):
    assert suggest_option(argument, KEYS) == suggestion


@pytest.mark.parametrize("program", [train, summary])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0.1"], "cannot use '--lr': did you mean --config.optimizer.learning_rate=VALUE?"),
        (["--lr=0.1"], "cannot use '--lr=0.1': did you mean --config.optimizer.learning_rate=0.1?"),
        (["--config.lr=0.1"], "the config has no key 'lr': did you mean 'optimizer.learning_rate'?"),
        (
            ["--config.augment.flip=yes"],
            "--config.augment.flip=yes has the wrong type: give true or false",
        ),
    ],
)
def test_programs_answer_in_one_line(program, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program(["--config=digits.py", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not list(tmp_path.iterdir())
