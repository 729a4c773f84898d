"""Reads config files: from `--config=FILE --config.KEY=VALUE` to a valid config."""

import ast
import importlib.util
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

import mlpmixer_flax
from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict, flatten, get_config
from mlpmixer_flax.faults import check_reachable
from mlpmixer_flax.limits import show
from mlpmixer_flax.text import shorten
from mlpmixer_flax.training.keys import suggest_key, suggest_option
from mlpmixer_flax.training.validate import example_values, validate


def load_config(path: str | os.PathLike[str], changes: Mapping[str, Any] | Sequence[str] = ()) -> ConfigDict:
    """Returns the config of a file, changed and checked.

    Args:
      path: of the file. If no such file exists, the name of a config of the package: "digits.py" or
        "configs/digits.py".
      changes: {"optimizer.learning_rate": 0.01}, {"optimizer": {"learning_rate": 0.01}}, or arguments as a
        program gets them: ["--config.optimizer.learning_rate=0.01"]. A duration that is changed in epochs is no
        longer what the file says in steps: with "total_epochs", "total_steps" becomes 0, unless it is changed too.

    Raises:
      UserError: the file is missing or broken, a key is unknown, or a value cannot be used.
    """
    config = _run_config_file(os.fspath(path))
    change_config(config, changes)
    return config


def change_config(config: ConfigDict, changes: Mapping[str, Any] | Sequence[str]) -> None:
    """Changes values of a config, and checks the whole.

    Args:
      changes: as of `load_config`.

    Raises:
      UserError: a key is unknown, or a value cannot be used.
    """
    apply_changes(config, changes)
    validate(config)


def apply_changes(config: ConfigDict, changes: Mapping[str, Any] | Sequence[str]) -> None:
    """Changes values of a config, of which other values may change before they are checked.

    Raises:
      UserError: a key is unknown, or a value has the wrong type.
    """
    values = example_values()  # a key left open also has one of its type
    if isinstance(changes, Mapping):
        given = flatten_dict(dict(changes), sep=".")
        for key, value in given.items():
            _change(config, key, value, values, given=f"{key}={show(value)}", words=("True", "False"))
    else:
        given = {}
        for argument in changes:
            key, value = _parse_argument(argument, values)
            _change(config, key, value, values, given=argument, words=("true", "false"))
            given[key] = value
    for key in given:
        steps = f"{key.removesuffix('_epochs')}_steps"
        if key.endswith("_epochs") and steps not in given:
            config.update_from_flattened_dict({steps: 0})


def shipped_configs() -> dict[str, Path]:
    """Returns name -> path of the configs of the package."""
    package = Path(mlpmixer_flax.__file__).parent
    inside = package / "configs"  # if the package is installed; in a clone, they are beside it
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.name: file for file in sorted(folder.glob("*.py"))}


def _find_config_file(path: str) -> Path:
    file = os.path.expanduser(path)
    if os.path.isfile(file):
        return Path(file)
    shipped = shipped_configs()
    name = path.removeprefix("configs/")
    if name in shipped:
        return shipped[name]
    check_reachable(file)
    raise UserError(f"config file {path} does not exist: give a path or one of {', '.join(shipped)}")


def _run_config_file(path: str) -> ConfigDict:
    # Absolute, because that is how the traceback of an error names the file.
    file = Path(os.path.abspath(_find_config_file(path)))
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: give one that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{path}, line {_line_of(error, file)}: {_explain(error)}") from None
    if config is None:
        raise UserError(f"{path} does not define get_config() that returns a config: see configs/digits.py")
    if not isinstance(config, ConfigDict) or flatten(config).keys() != flatten(get_config()).keys():
        raise UserError(
            f"get_config() in {path} must return the base config with other values: do not add or remove keys"
        )
    return config


def _line_of(error: BaseException, file: Path) -> int:
    """Returns the line of the config file that raised an error, also if it was raised further inside."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 1 for frame in frames if frame.filename == str(file)]
    return lines[-1] if lines else 1


def _explain(error: BaseException) -> str:
    """Returns what an error of a config file means, in our words if ml_collections raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = frames[-1] if frames else None
    if inside is None or inside.f_globals.get("__name__", "").split(".")[0] != ml_collections.__name__:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    values = example_values()
    section, key = inside.f_locals.get("self"), inside.f_locals.get("key", inside.f_locals.get("attribute"))
    if not isinstance(section, ConfigDict) or not isinstance(key, str):
        return "a value of the config cannot be changed in this way: write config.KEY = VALUE"
    key = _path_to(section) + key
    if key not in values:
        return f"the config has no key {show(key, 120)}: {suggest_key(key, list(values))}"
    if "value" not in inside.f_locals:
        return f"key {key!r} cannot be removed: give it a value, such as {values[key]!r}"
    value = inside.f_locals["value"]
    return f"{key}={show(value)} has the wrong type: give {_example(values[key], words=('True', 'False'))}"


def _path_to(section: ConfigDict, base: ConfigDict | None = None, prefix: str = "") -> str:
    """Returns the dotted path to a section, ending in ".", found by its keys; "" for the config itself."""
    for name, inner in (base or get_config()).items():
        if isinstance(inner, ConfigDict):
            path = f"{prefix}{name}."
            if inner.keys() == section.keys():
                return path
            if deeper := _path_to(section, inner, path):
                return deeper
    return ""


def _parse_argument(argument: str, values: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns (key, value) of an argument; the value is None if it has the wrong type."""
    name, equals, text = argument.partition("=")
    key = name.removeprefix("--config.")
    if key == name or not equals:
        raise UserError(f"cannot use {show(argument, 120)}: {suggest_option(argument, list(values))}")
    try:
        return key, _parse(text, like=values.get(key, ""))
    except (KeyError, TypeError, ValueError, SyntaxError):
        return key, None


def _change(
    config: ConfigDict,
    key: str,
    value: Any,
    values: Mapping[str, Any],
    *,
    given: str,
    words: tuple[str, str],
) -> None:
    """Sets a key of the config. The value None has the wrong type for every key.

    Args:
      values: an example of the value of each key, by dotted key.
      given, words: for the message: the change, and what true and false are called where it is written.
    """
    if key not in values:
        raise UserError(f"the config has no key {show(key, 120)}: {suggest_key(key, list(values))}")
    wrong_type = UserError(
        f"{shorten(given, 120)} has the wrong type: give {_example(values[key], words=words)}"
    )
    if value is None or isinstance(value, bool) != isinstance(values[key], bool):  # True would become 1.0
        raise wrong_type
    try:
        config.update_from_flattened_dict({key: value})
    except (KeyError, TypeError, ValueError, OverflowError):  # OverflowError: an integer that no float can be
        raise wrong_type from None


def _example(value: Any, *, words: tuple[str, str]) -> str:
    return " or ".join(words) if isinstance(value, bool) else f"a value such as {value!r}"


def _parse(text: str, *, like: Any) -> Any:
    """Returns the value of an argument, for a key with a value such as `like`."""
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(like, tuple) and like and all(isinstance(element, str) for element in like):
        return tuple(part.strip(" '\"") for part in text.strip("()[]").split(",") if part.strip())
    if isinstance(like, tuple) and not text.strip():
        return ()
    value = ast.literal_eval(text)
    if not isinstance(like, tuple):
        return value
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
