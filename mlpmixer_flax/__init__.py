"""MLP-Mixer in JAX and Flax: train, fine-tune, predict, and look inside.

    import mlpmixer_flax as mf
    model = mf.load("imagenet21k/Mixer-B_16")
    model.predict(["cat.jpg"])
    mf.fit(mf.load_config("digits.py"), "runs/digits")

Importing the package does not import JAX: each public name is imported when it is first used.
"""

import contextlib
import importlib
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlpmixer_flax.config import get_config
    from mlpmixer_flax.dataloader import get_dataset_info
    from mlpmixer_flax.inference.load import load
    from mlpmixer_flax.inference.model import Model, Prediction
    from mlpmixer_flax.models import MixerBlock, MlpBlock, MlpMixer
    from mlpmixer_flax.training.configfile import load_config
    from mlpmixer_flax.training.loop import fit

__version__ = "0.1.0"

# Public name -> the module that defines it
_HOMES = {
    "Model": "inference.model",
    "Prediction": "inference.model",
    "load": "inference.load",
    "fit": "training.loop",
    "load_config": "training.configfile",
    "get_config": "config",
    "get_dataset_info": "dataloader",
    "MlpMixer": "models",
    "MixerBlock": "models",
    "MlpBlock": "models",
}
__all__ = [
    "MixerBlock",
    "MlpBlock",
    "MlpMixer",
    "Model",
    "Prediction",
    "UserError",
    "fit",
    "get_config",
    "get_dataset_info",
    "load",
    "load_config",
]


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, with its value, and what to do.

    Programs print it without a traceback and exit with status 2.
    """


def quiet_ctrl_c() -> None:
    """Makes Ctrl-C end the process without a traceback while a program imports what it needs, for a second or two.

    `ending.exit_status` makes it a KeyboardInterrupt again. If SIGINT is already ignored or has another handler, nothing
    changes.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # in another than the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    # This import is the first step of `python -m mlpmixer_flax.train`.
    quiet_ctrl_c()
    importlib.import_module(f"{__name__}.huge_pages").use_huge_pages()
