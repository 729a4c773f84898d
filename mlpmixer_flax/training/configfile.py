"""Config files: from `--config=FILE --config.KEY=VALUE` to a valid config."""

import ast
import difflib
import importlib.util
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import mlpmixer_flax
from mlpmixer_flax import UserError
from mlpmixer_flax.config import flatten, get_config
from mlpmixer_flax.training.validate import validate


def load_config(path: str, changes: Mapping[str, Any] | Sequence[str] = ()) -> ConfigDict:
    """Returns the config of a file, with changes, after all checks of single values.

    Args:
      path: of the file; a path that does not exist is looked up among the configs of the package ("digits.py").
      changes: {"optimizer.learning_rate": 0.01}, or arguments as a program gets them:
        ["--config.optimizer.learning_rate=0.01"].

    Raises:
      UserError: the file is missing or broken, a key is unknown, or a value has the wrong type or is out of range.
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
    """Returns name -> path of the package's configs: inside it when installed, beside it in a clone."""
    package = Path(mlpmixer_flax.__file__).parent
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.name: file for file in sorted(folder.glob("*.py"))}


def _find_config_file(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    shipped = shipped_configs()
    name = path.removeprefix("configs/")
    if name in shipped:
        return shipped[name]
    raise UserError(f"config file {path} does not exist: give a path, or one of {', '.join(shipped)}")


def _run_config_file(file: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None:
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
            f"get_config() in {file} must return the base config with changed values, without adding or removing keys"
        )
    return config


def _parse_argument(config: ConfigDict, argument: str) -> None:
    name, equals, text = argument.partition("=")
    key = name.removeprefix("--config.")
    if key == name or not equals:
        raise UserError(f"cannot use {argument!r}: change a key of the config with --config.KEY=VALUE")
    try:
        value = _parse(text, like=flatten(config).get(key, ""))
    except (KeyError, TypeError, ValueError, SyntaxError):
        value = None  # has the wrong type for every key
    _change(config, key, value, given=argument)


def _change(config: ConfigDict, key: str, value: Any, *, given: str) -> None:
    values = flatten(config)
    if key not in values:
        raise UserError(f"the config has no key {key!r}: {_suggest(key, list(values))}")
    try:
        if value is None:
            raise TypeError
        config.update_from_flattened_dict({key: value})
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{given} has the wrong type: give a value such as the present one, {values[key]!r}"
        ) from None


def _parse(text: str, *, like: Any) -> Any:
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
    return f"did you mean {close[0]!r}?" if close else "get_config() in mlpmixer_flax/config.py lists all"
