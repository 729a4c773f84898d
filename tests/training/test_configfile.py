"""Tests the way from a file and changes to a config, and the sentence about each possible mistake."""

import subprocess
import sys

import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.training.configfile import load_config


def test_a_config_of_the_package_is_found_from_any_directory(tmp_path):
    code = "from mlpmixer_flax.training.configfile import load_config; print(load_config('configs/mnist.py').dataset)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "mnist\n", done.stderr


def test_a_file_of_the_user_comes_before_one_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "digits.py").write_text(
        "from mlpmixer_flax.config import get_config as base\n"
        "def get_config():\n    config = base()\n    config.batch_size = 11\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("digits.py").batch_size == load_config(tmp_path / "digits.py").batch_size == 11
    assert load_config("configs/digits.py").batch_size == 64


def test_arguments_get_the_type_of_the_value_they_replace():
    config = load_config(
        "digits.py",
        [
            "--config.batch_size=32",
            "--config.optimizer.learning_rate=1",
            "--config.augment.flip=true",
            "--config.preprocess.mean=0.1,0.2,0.3",
            "--config.preprocess.std=0.25",
            "--config.model.patches.size=(4, 2)",
            "--config.augment.randaugment_ops=[rotate, invert]",
            "--config.train_split=train[:50%]",
            "--config.data_dir=",
            "--config.resolutions_px=",
        ],
    )
    assert config.resolutions_px == ()
    assert config.batch_size == 32
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.augment.flip is True
    assert config.preprocess.mean == (0.1, 0.2, 0.3) and config.preprocess.std == (0.25,)
    assert config.model.patches["size"] == (4, 2)
    assert load_config("digits.py", ["--config.model.patches.size=[4, 2]"]).model.patches["size"] == (4, 2)
    assert config.augment.randaugment_ops == ("rotate", "invert")
    assert config.train_split == "train[:50%]" and config.data_dir == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.batch_sze=3", "no key 'batch_sze': did you mean 'batch_size'"),
        ("--config.learning_rate=3", "no key 'learning_rate': did you mean 'optimizer.learning_rate'"),
        ("--config.model.hidden=3", "no key 'model.hidden': did you mean 'model.hidden_dim'"),
        ("--config.qqq=3", r"no key 'qqq': mlpmixer_flax/config.py lists all keys"),
        (
            "--config.batch_size=many",
            "--config.batch_size=many has the wrong type: give a value such as 64",
        ),
        ("--config.batch_size=1.5", "has the wrong type: give a value such as 64"),
        ("--config.augment.flip=perhaps", "has the wrong type: give true or false$"),
        ("--config.augment.flip=yes", "flip=yes has the wrong type: give true or false$"),
        ("--config.preprocess.mean=grey", r"has the wrong type: give a value such as \(0.5,\)"),
        (
            "--config.augment.flip",
            "cannot use '--config.augment.flip': did you mean --config.augment.flip=VALUE",
        ),
        ("--batch_size=3", r"cannot use '--batch_size=3': did you mean --config.batch_size=3\?"),
        ("--qqq=3", "cannot use '--qqq=3': to change a key of the config, give --config.KEY=VALUE"),
        ("photos/", "cannot use 'photos/': to change a key of the config, give --config.KEY=VALUE"),
        ("--config.optimizer=sgd", "no key 'optimizer': it is a group of keys: .* such as 'optimizer.name'"),
        ("--config.batch_size=-1", "batch_size=-1 must be at least 1"),
    ],
)
def test_an_unusable_argument_is_named_with_the_remedy(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("digits.py", [override])
    assert "\n" not in str(error.value)


def test_changes_may_be_a_mapping_with_dotted_or_nested_keys():
    config = load_config(
        "digits.py",
        {
            "total_epochs": 3,
            "optimizer.learning_rate": 0.01,
            "optimizer": {"name": "sgd"},
            "model": {"patches": {"size": [4, 2]}},
            "preprocess.mean": (0.1, 0.2, 0.3),
            "augment.flip": True,
            "data_dir": "here",
        },
    )
    assert config.total_epochs == 3.0 and isinstance(config.total_epochs, float)
    assert (config.optimizer.learning_rate, config.optimizer.name) == (0.01, "sgd")
    assert config.model.patches["size"] == (4, 2)
    assert config.preprocess.mean == (0.1, 0.2, 0.3)
    assert config.augment.flip is True and config.data_dir == "here"
    assert config.optimizer.weight_decay == load_config("digits.py").optimizer.weight_decay  # not changed


def test_a_mapping_and_arguments_give_the_same_config():
    arguments = ["--config.total_epochs=3", "--config.augment.flip=true", "--config.preprocess.std=0.25"]
    mapping = {"total_epochs": 3, "augment.flip": True, "preprocess.std": (0.25,)}
    assert load_config("digits.py", arguments).to_dict() == load_config("digits.py", mapping).to_dict()
    assert load_config("digits.py", {}).to_dict() == load_config("digits.py").to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sze": 3}, "no key 'batch_sze': did you mean 'batch_size'"),
        (
            {"optimizer": {"lerning_rate": 3}},
            "no key 'optimizer.lerning_rate': did you mean 'optimizer.learning",
        ),
        ({"optimizer": "sgd"}, "no key 'optimizer': it is a group of keys: change one"),
        ({"batch_size": "many"}, "batch_size='many' has the wrong type: give a value such as 64"),
        ({"batch_size": None}, "batch_size=None has the wrong type: give a value such as 64"),
        ({"batch_size": True}, "batch_size=True has the wrong type: give a value such as 64"),
        ({"augment": {"flip": "true"}}, "augment.flip='true' has the wrong type: give True or False$"),
        ({"preprocess.mean": 0.5}, r"preprocess.mean=0.5 has the wrong type: give a value such as \(0.5,\)"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1: change --config.batch_size"),
    ],
)
def test_an_unusable_change_in_a_mapping_is_named_with_the_remedy(changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("digits.py", changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "mine.py, line 1: SyntaxError"),
        ("x = 1\n", r"mine.py does not define get_config\(\) that returns a config: see configs/digits.py"),
        ("def get_config():\n    pass\n", r"mine.py does not define get_config\(\) that returns a config"),
        ("def get_config():\n    return {}\n", "mine.py must return the base config"),
        ("def get_config():\n    return 1 / 0\n", "mine.py, line 2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: SystemExit: 3"),
        ("import nowhere\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)


HEAD = "from mlpmixer_flax.config import get_config as base\n\ndef get_config():\n    config = base()\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.batch_sizes = 3", "the config has no key 'batch_sizes': did you mean 'batch_size'?"),
        ("config.lr = 3", "the config has no key 'lr': did you mean 'optimizer.learning_rate'?"),
        ("config['epochs'] = 3", "the config has no key 'epochs': did you mean 'total_epochs'?"),
        (
            "config.optimizer.lr = 0.1",
            "the config has no key 'optimizer.lr': did you mean 'optimizer.learning_rate'?",
        ),
        (
            "config.model.patches.sizes = (4, 4)",
            "the config has no key 'model.patches.sizes': did you mean 'model.patches.size'?",
        ),
        ("x = config.model.depth", "the config has no key 'model.depth': did you mean 'model.num_blocks'?"),
        (
            "config.model.update({'depth': 3})",
            "the config has no key 'model.depth': did you mean 'model.num_blocks'?",
        ),
        (
            "config.update_from_flattened_dict({'optimizer.wd': 3})",
            "the config has no key 'optimizer.wd': did you mean 'optimizer.weight_decay'?",
        ),
        ("config.batch_size = 'many'", "batch_size='many' has the wrong type: give a value such as 64"),
        ("config.augment.flip = 1", "augment.flip=1 has the wrong type: give True or False"),
        (
            "config.model.patches.size = 4",
            "model.patches.size=4 has the wrong type: give a value such as (2, 2)",
        ),
        (
            "config.optimizer = 'sgd'",
            "the config has no key 'optimizer': it is a group of keys: change one of them, such as 'optimizer.name'",
        ),
        ("del config.seed", "key 'seed' cannot be removed: give it a value, such as 0"),
    ],
)
def test_errors_of_the_config_are_in_our_words_with_the_line(tmp_path, monkeypatch, line, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(f"{HEAD}    {line}\n    return config\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine/mine.py", "./mine/../mine/mine.py", str(tmp_path / "mine" / "mine.py")):
        with pytest.raises(UserError) as error:
            load_config(name)
        assert str(error.value) == f"{name}, line 5: {message}"


def test_a_relative_name_does_not_change_the_line_of_an_error(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("\n\ndef broken():\n    return 1 / 0\n")
    (tmp_path / "mine.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nimport helper\n\ndef get_config():\n    return helper.broken()\n"
    )
    (tmp_path / "other.py").write_text("x = 1\n\nimport bad_syntax\n")
    (tmp_path / "bad_syntax.py").write_text("\n" * 20 + "def (\n")
    (tmp_path / "link.py").symlink_to("mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, message in [
        ("mine.py", r"^mine\.py, line 6: ZeroDivisionError: division by zero$"),
        ("link.py", r"^link\.py, line 6: ZeroDivisionError: division by zero$"),
        ("other.py", r"^other\.py, line 3: SyntaxError"),
    ]:
        with pytest.raises(UserError, match=message):
            load_config(name)


def test_a_tilde_in_the_name_of_a_config_is_the_home_directory(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"{HEAD}    config.batch_size = 11\n    return config\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/mine.py").batch_size == 11


@pytest.mark.parametrize(
    ("changes", "steps", "epochs"),
    [
        ({"total_epochs": 3.0}, 0, 3.0),
        ({"total_steps": 7}, 7, 30.0),
        ({"total_epochs": 3.0, "total_steps": 7}, 7, 3.0),
        ({"total_steps": 7, "total_epochs": 3.0}, 7, 3.0),
    ],
)
def test_a_length_given_in_epochs_replaces_one_that_the_file_gives_in_steps(tmp_path, changes, steps, epochs):
    (tmp_path / "mine.py").write_text(
        f"{HEAD}    config.total_steps = 500\n    config.schedule.warmup_steps = 50\n    return config\n"
    )
    file = str(tmp_path / "mine.py")
    for given in (changes, [f"--config.{key}={value}" for key, value in changes.items()]):
        config = load_config(file, given)
        assert (config.total_steps, config.total_epochs) == (steps, epochs)
        assert config.schedule.warmup_steps == 50
    config = load_config(file, {"schedule": {"warmup_epochs": 2.0}, "eval_every_epochs": 0.5})
    assert (config.schedule.warmup_steps, config.schedule.warmup_epochs, config.total_steps) == (0, 2.0, 500)


def test_the_error_about_a_missing_file_lists_the_configs_of_the_package():
    with pytest.raises(
        UserError, match=r"config file nowhere\.py does not exist: .*b16_cifar10\.py, .*digits\.py"
    ):
        load_config("nowhere.py")


def test_only_a_name_without_another_folder_means_a_config_of_the_package():
    assert load_config("mnist.py").dataset == load_config("configs/mnist.py").dataset == "mnist"
    with pytest.raises(UserError, match="config file mine/mnist.py does not exist"):
        load_config("mine/mnist.py")


def test_a_file_that_is_not_python_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json is not a Python file: give one that defines"):
        load_config(str(tmp_path / "config.json"))
