"""MLP-Mixer in Flax (Linen): build, train, evaluate.

Importing the package loads no JAX: the public names below are fetched on first use.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "MlpBlock": "models",
    "MixerBlock": "models",
    "MlpMixer": "models",
    "get_config": "config",
    "get_dataset_info": "dataloader",
}
__all__ = ["UserError", *_HOMES]


class UserError(ValueError):
    """What the user gave cannot be used; the message is one sentence with the value and the remedy.

    Programs print it without a traceback and exit with status 2.
    """


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
