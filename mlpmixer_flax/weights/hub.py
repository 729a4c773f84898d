"""Gets files of models from the Hugging Face hub, and uploads models to it, with its own library and cache."""

import contextlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.download import DownloadError

# The names that timm and other programs give to a model's files, on the hub and in folders.
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"


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


def check_name(name: str) -> None:
    """Raises UserError if a name is not that of a model on the hub, or if huggingface_hub is not installed."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{name!r} is not the name of a model on the Hugging Face hub: give OWNER/NAME")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(
            f'an upload to {name} needs huggingface_hub: run pip install "mlpmixer-flax[hub]"'
        ) from None


def create(name: str) -> None:
    """Makes sure that a model exists on the hub and that it may be changed; a new one is public and empty.

    Args:
      name: OWNER/NAME, checked by `check_name`.

    Raises:
      UserError: the hub cannot be reached, or refuses it.
    """
    import huggingface_hub

    with _uploading(name):
        huggingface_hub.create_repo(name, exist_ok=True)


def push(folder: Path, name: str) -> list[str]:
    """Uploads the three files of a model in one commit, and returns a sentence for the user about each result.

    A model card that the hub has already is kept, because somebody may have completed it there.

    Args:
      folder: has WEIGHTS_FILE, CONFIG_FILE and CARD_FILE; nothing else in it is uploaded.
      name: OWNER/NAME of a model for which `create` was called.

    Raises:
      UserError: the hub cannot be reached, or refuses it; the message says where the files are.
    """
    import huggingface_hub

    with _uploading(name, f"; its files are in {folder}"):
        has_card = huggingface_hub.file_exists(name, CARD_FILE)
        commit = huggingface_hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, *([] if has_card else [CARD_FILE])],
            commit_message="Upload a model of mlpmixer-flax",
        )
    notes = [f"uploaded to {commit.repo_url}: read it with hf-hub:{name}"]
    if has_card:
        notes.append(f"{CARD_FILE} on the hub is kept: change it there")
    return notes


@contextlib.contextmanager
def _uploading(name: str, end: str = "") -> Iterator[None]:
    """Raises whatever goes wrong in the block as a UserError that ends with `end`."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # of any class: from the hub, its HTTP client or the disk
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        remedy = "check the name and the network"
        if status in (401, 403):
            remedy = "run hf auth login with a token that may write to it, or choose another OWNER"
        raise UserError(f"the Hugging Face hub does not take {name} ({reason}): {remedy}{end}") from None
