"""Gets files of models from the Hugging Face hub, with its own library and cache."""

import textwrap
from pathlib import Path
from typing import NamedTuple

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.download import DownloadError

# The names that timm and other programs give to a model's files, on the hub and in folders.
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class Model(NamedTuple):
    """A model on the hub, as "hf-hub:OWNER/NAME@REVISION" names it."""

    name: str  # OWNER/NAME
    revision: str | None  # a branch, tag or commit; None = the main branch

    def __str__(self) -> str:
        return f"hf-hub:{self.name}" + (f"@{self.revision}" if self.revision else "")


def parse(source: str) -> Model:
    """Returns the model that a source names.

    Raises:
      UserError: the revision is empty.
    """
    name, at, revision = source.removeprefix("hf-hub:").partition("@")
    if at and not revision:
        raise UserError(
            f"{source!r} ends without a revision: give a branch, tag or commit, or leave out the @"
        )
    return Model(name, revision or None)


def get_file(model: Model, file: str) -> Path | None:
    """Returns the local path of a model's file, or None if the model has no such file.

    The network is used only if the hub's cache does not know the answer.

    Raises:
      UserError: huggingface_hub is not installed, or there is no such model or revision.
      DownloadError: the file cannot be downloaded.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UserError(f'{model} needs huggingface_hub: run pip install "mlpmixer-flax[hub]"') from None
    try:
        cached = huggingface_hub.try_to_load_from_cache(model.name, file, revision=model.revision)
        if cached is not None:  # a path, or the object that stands for a file known not to exist
            return Path(cached) if isinstance(cached, str) else None
        return Path(huggingface_hub.hf_hub_download(model.name, file, revision=model.revision))
    except errors.RemoteEntryNotFoundError:
        return None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"hf-hub:{model.name} has no revision {model.revision!r}: give a branch, tag or commit that it has"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the Hugging Face hub has no model {model.name!r} that you may read: check the name, or run "
            "hf auth login if the model is private or asks for consent"
        ) from None
    except Exception as error:  # of any class: from the hub, its HTTP client or the disk
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise DownloadError(
            f"{file} of {model} cannot be downloaded ({reason}): check the name and the network",
            f"{huggingface_hub.constants.HF_HUB_CACHE} (HF_HUB_CACHE chooses another directory)",
        ) from None
