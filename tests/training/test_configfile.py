"""From the command line to a config: files, overrides, and what is wrong with them in a sentence."""

import subprocess
import sys

import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.training.configfile import load_config


def test_shipped_config_is_found_from_any_directory(tmp_path):
    code = "from mlpmixer_flax.training.configfile import load_config; print(load_config('configs/mnist.py').dataset)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "mnist\n", done.stderr


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "digits.py").write_text(
        "from mlpmixer_flax.config import get_config as base\n"
        "def get_config():\n    config = base()\n    config.batch_size = 11\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("digits.py").batch_size == 11
    assert load_config("configs/digits.py").batch_size == 64


def test_overrides_take_the_type_of_what_they_replace():
    config = load_config(
        "digits.py",
        [
            "--config.batch_size=32",
            "--config.optimizer.learning_rate=1",
            "--config.augment.flip=true",
            "--config.preprocess.mean=0.1,0.2,0.3",
            "--config.preprocess.std=0.25",
            "--config.model.patches.size=(4, 2)",
            "--config.augment.randaugment_ops=rotate,invert",
            "--config.train_split=train[:50%]",
            "--config.data_dir=",
        ],
    )
    assert config.batch_size == 32
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.augment.flip is True
    assert config.preprocess.mean == (0.1, 0.2, 0.3) and config.preprocess.std == (0.25,)
    assert config.model.patches["size"] == (4, 2)
    assert config.augment.randaugment_ops == ("rotate", "invert")
    assert config.train_split == "train[:50%]" and config.data_dir == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.batch_sze=3", "no key 'batch_sze': did you mean 'batch_size'"),
        ("--config.learning_rate=3", "no key 'learning_rate': did you mean 'optimizer.learning_rate'"),
        ("--config.model.hidden=3", "no key 'model.hidden': did you mean 'model.hidden_dim'"),
        ("--config.qqq=3", r"no key 'qqq': get_config\(\) in mlpmixer_flax/config.py lists all"),
        ("--config.batch_size=many", "--config.batch_size=many is of the wrong type: batch_size is now 64"),
        ("--config.batch_size=1.5", "wrong type"),
        ("--config.augment.flip=perhaps", "wrong type: augment.flip is now False"),
        ("--config.preprocess.mean=grey", "wrong type"),
        ("--config.augment.flip", "cannot use '--config.augment.flip': .*--config.KEY=VALUE"),
        ("--batch_size=3", "cannot use '--batch_size=3'"),
        ("--config.optimizer=sgd", "no key 'optimizer'"),
        ("--config.batch_size=-1", "batch_size=-1 must be at least 1"),
    ],
)
def test_unusable_override_is_named_with_the_remedy(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("digits.py", [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "mine.py, line 1: SyntaxError"),
        ("x = 1\n", "mine.py, line 1: AttributeError: .*get_config"),
        ("def get_config():\n    return {}\n", "mine.py must return the base config"),
        ("def get_config():\n    return 1 / 0\n", "mine.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: SystemExit: 3"),
        ("import nowhere\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
        (
            "from mlpmixer_flax.config import get_config as base\n\ndef get_config():\n"
            "    config = base()\n    config.batch_sizes = 3\n    return config\n",
            "mine.py, line 5: AttributeError: .*batch_size",
        ),
        (
            "from mlpmixer_flax.config import get_config as base\n\ndef get_config():\n"
            "    config = base()\n    config.batch_size = 'many'\n    return config\n",
            "mine.py, line 5: TypeError: .*batch_size",
        ),
    ],
)
def test_broken_file_is_named_with_the_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)


def test_missing_file_is_said_with_those_there_are():
    with pytest.raises(UserError, match=r"no config file nowhere\.py: .*b16_cifar10\.py, .*digits\.py"):
        load_config("nowhere.py")


def test_only_a_name_stands_for_a_shipped_config():
    assert load_config("mnist.py").dataset == load_config("configs/mnist.py").dataset == "mnist"
    with pytest.raises(UserError, match="no config file mine/mnist.py"):
        load_config("mine/mnist.py")


def test_a_file_that_is_not_python_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a Python file"):
        load_config(str(tmp_path / "config.json"))
