"""Reads config files: from `--config=FILE --config.KEY=VALUE` to a valid config."""

import ast
import difflib
import importlib.util
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

import mlpmixer_flax
from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict, flatten, get_config, resolve
from mlpmixer_flax.training.validate import validate


def load_config(path: str, changes: Mapping[str, Any] | Sequence[str] = ()) -> ConfigDict:
    """Returns the config of a file, changed and checked.

    Args:
      path: of the file. If no such file exists, the name of a config of the package: "digits.py" or
        "configs/digits.py".
      changes: {"optimizer.learning_rate": 0.01}, {"optimizer": {"learning_rate": 0.01}}, or arguments as a
        program gets them: ["--config.optimizer.learning_rate=0.01"].

    Raises:
      UserError: the file is missing or broken, a key is unknown, or a value cannot be used.
    """
    config = _run_config_file(_find_config_file(path))
    if isinstance(changes, Mapping):
        for key, value in flatten_dict(dict(changes), sep=".").items():
            _change(config, key, value, given=f"{key}={value!r}")
    else:
        for argument in changes:
            _parse_argument(config, argument)
    validate(config)
    return config


def shipped_configs() -> dict[str, Path]:
    """Returns name -> path of the configs of the package."""
    package = Path(mlpmixer_flax.__file__).parent
    inside = package / "configs"  # if the package is installed; in a clone, they are beside it
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.name: file for file in sorted(folder.glob("*.py"))}


def _find_config_file(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    shipped = shipped_configs()
    name = path.removeprefix("configs/")
    if name in shipped:
        return shipped[name]
    raise UserError(f"config file {path} does not exist: give a path or one of {', '.join(shipped)}")


def _run_config_file(file: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file: give one that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        message = " ".join(str(error).split())
        raise UserError(f"{file}, line {line}: {type(error).__name__}: {message}") from None
    if not isinstance(config, ConfigDict) or flatten(config).keys() != flatten(get_config()).keys():
        raise UserError(
            f"get_config() in {file} must return the base config with other values: do not add or remove keys"
        )
    return config


def _parse_argument(config: ConfigDict, argument: str) -> None:
    name, equals, text = argument.partition("=")
    key = name.removeprefix("--config.")
    if key == name or not equals:
        raise UserError(f"cannot use {argument!r}: to change a key of the config, give --config.KEY=VALUE")
    try:
        value = _parse(text, like=flatten(config).get(key, ""))
    except (KeyError, TypeError, ValueError, SyntaxError):
        value = None
    _change(config, key, value, given=argument)


def _change(config: ConfigDict, key: str, value: Any, *, given: str) -> None:
    """Sets a key of the config. The value None has the wrong type for every key."""
    values = flatten(resolve(config, {}))  # a key left open also gets an example of its type
    if key not in values:
        raise UserError(f"the config has no key {key!r}: {_suggest(key, list(values))}")
    wrong_type = UserError(f"{given} has the wrong type: give a value such as {values[key]!r}")
    if value is None:
        raise wrong_type
    try:
        config.update_from_flattened_dict({key: value})
    except (KeyError, TypeError, ValueError):
        raise wrong_type from None


def _parse(text: str, *, like: Any) -> Any:
    """Returns the value of an argument, for a key whose present value is `like`."""
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if isinstance(like, tuple) and like and all(isinstance(element, str) for element in like):
        return tuple(part.strip(" '\"") for part in text.strip("()").split(",") if part.strip())
    value = ast.literal_eval(text)
    return (value,) if isinstance(like, tuple) and not isinstance(value, tuple) else value


def _suggest(key: str, keys: list[str]) -> str:
    by_leaf = {known.split(".")[-1]: known for known in keys}
    close = difflib.get_close_matches(key, keys, n=1)
    close = close or [by_leaf[leaf] for leaf in difflib.get_close_matches(key.split(".")[-1], by_leaf, n=1)]
    return f"did you mean {close[0]!r}?" if close else "mlpmixer_flax/config.py lists all keys"
