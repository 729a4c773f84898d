"""From `--config=FILE --config.KEY=VALUE` to a valid config."""

import ast
import difflib
import importlib.util
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mlpmixer_flax import UserError
from mlpmixer_flax.config import flatten, get_config
from mlpmixer_flax.validate import validate


def load_config(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, changed by arguments of the form `--config.KEY=VALUE`, validated.

    A path that isn't there is looked up among the configs shipped with the package. Raises UserError
    for a missing or broken file, an unknown key, a value of the wrong type or out of range.
    """
    config = _run_config_file(_find_config_file(path))
    for argument in overrides:
        _override(config, argument)
    validate(config)
    return config


def shipped_configs() -> dict[str, Path]:
    """Name -> path of the configs that come with the package: inside it once installed, in a clone beside it."""
    inside = Path(__file__).parent / "configs"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "configs"
    return {file.name: file for file in sorted(folder.glob("*.py"))}


def _find_config_file(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    shipped = shipped_configs()
    name = path.removeprefix("configs/")
    if name in shipped:
        return shipped[name]
    raise UserError(f"there is no config file {path}: give its path, or one of {', '.join(shipped)}")


def _run_config_file(file: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None:
        raise UserError(f"{file} is not a Python file: a config file is one with a get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # whatever a file of the user's raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        message = " ".join(str(error).split())
        raise UserError(f"{file}, line {line}: {type(error).__name__}: {message}") from None
    if not isinstance(config, ConfigDict) or flatten(config).keys() != flatten(get_config()).keys():
        raise UserError(
            f"get_config() in {file} must return the base config, with values changed but no keys"
        )
    return config


def _override(config: ConfigDict, argument: str) -> None:
    name, equals, text = argument.partition("=")
    key = name.removeprefix("--config.")
    if key == name or not equals:
        raise UserError(f"cannot use {argument!r}: a key of the config is changed by --config.KEY=VALUE")
    values = flatten(config)
    if key not in values:
        raise UserError(f"the config has no key {key!r}: {_suggest(key, list(values))}")
    try:
        config.update_from_flattened_dict({key: _parse(text, like=values[key])})
    except (KeyError, TypeError, ValueError, SyntaxError):
        raise UserError(f"{argument} is of the wrong type: {key} is now {values[key]!r}") from None


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
