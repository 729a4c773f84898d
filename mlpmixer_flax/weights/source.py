"""Finds and loads weights by name: published names, files, URLs, the Hugging Face hub, run directories."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import check_reachable
from mlpmixer_flax.remote import NothingThere, copy_of, shown
from mlpmixer_flax.run_weights import default_checkpoint, describe_weights, open_run
from mlpmixer_flax.rundir import fetch_run, is_run, read_config
from mlpmixer_flax.weights import hub, suggestions, timm_config
from mlpmixer_flax.weights.adapt import Params, adapt
from mlpmixer_flax.weights.catalog import PUBLISHED, Published
from mlpmixer_flax.weights.download import DownloadError, fetch
from mlpmixer_flax.weights.files import Weights, open_weights
from mlpmixer_flax.weights.module import check_shapes
from mlpmixer_flax.weights.origin import with_origin

# The ends of names of pickles in a folder of weights; of them, PyTorch's name on the hub is pytorch_model.bin.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar")
# The address of a file on the hub: OWNER/NAME and the revision are its groups.
_HUB_FILE = re.compile(r"(?i)https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/resolve/([^/]+)/.*")


class NamedRun(NamedTuple):
    """A run directory and which of its weights are meant, as "runs/b16@best" names them."""

    workdir: Path
    checkpoint: str | None  # as for `run_weights.open_run`


def published_as(source: str | Path) -> Published | None:
    """Returns the published weights that a source names, by their name, also with a revision, or by their address."""
    source = _synonym(source)
    if source.startswith("hf-hub:"):
        source = f"hf-hub:{hub.parse(source).name}"
    address = _without_query(source)
    if hub_file := _HUB_FILE.fullmatch(address):
        address = f"hf-hub:{hub_file[1]}"
    return PUBLISHED.get(source) or next((each for each in PUBLISHED.values() if each.url == address), None)


def describe(source: str | Path) -> Mapping[str, Any]:
    """Returns how weights were trained: `model` and `preprocess` as in a run's config, `class_names` if known.

    Downloads nothing for a published name.

    Raises:
      UserError: as `load`.
    """
    published = published_as(source)
    return published.origin if published else find(source).metadata


def load(
    source: str | Path,
    like: Params,
    *,
    grid: tuple[int, int] | None = None,
    head: str = "auto",
    class_names: Sequence[str] = (),
) -> Params:
    """Returns weights adapted to a model, as a tree of float32 numpy arrays; prints a note about each change.

        params = model.init(key, images)["params"]
        params = pretrained.load("imagenet21k/Mixer-B_16", like=params)

    Args:
      source: a published name, file, URL, "hf-hub:OWNER/NAME", folder or run directory; see
        `pretrained --help`.
      like: the model's parameters, arrays or jax.ShapeDtypeStruct; a new head is copied from it.
      grid: (rows, columns) of the model's tokens; None = square. If the weights have another grid, token
        mixing is changed exactly (paper, Appendix C) or resampled: see `adapt.adapt`.
      head: "keep", "reset", or "auto": keep the head if it has the same number of classes, and the same class
        names if both are known.
      class_names: of the model, if known.

    Raises:
      UserError: the weights cannot be found, downloaded or read, or do not fit the model; the message lists
        all reasons why they do not fit.
    """
    return load_found(find(source), like, name=str(source), grid=grid, head=head, class_names=class_names)


def load_found(
    weights: Weights,
    like: Params,
    *,
    name: str,
    grid: tuple[int, int] | None = None,
    head: str = "auto",
    class_names: Sequence[str] = (),
) -> Params:
    """Returns weights from `find`, adapted to a model as by `load`; notes and errors call them `name`."""
    theirs = weights.metadata.get("class_names")
    params, notes = adapt(
        {**weights.shapes, **dict.fromkeys(weights.unknown, ())},  # so that unknown names are reported
        weights.read,
        like,
        grid=grid,
        source_grid=_grid(weights),
        head=head,
        same_classes=list(theirs) == list(class_names) if theirs and class_names else None,
        name=name,
    )
    for note in [*notes, *weights.notes]:
        print(f"{name}: {note}")
    return params


def find(source: str | Path) -> Weights:
    """Opens weights without reading any array; the metadata says how they were trained, as far as known.

    Raises:
      UserError: as `load`.
    """
    source = _synonym(source)
    if source.startswith("hf-hub:"):
        return _open_hub_model(hub.parse(source))
    if source in PUBLISHED:
        return _open_published(source)
    if advice := suggestions.for_address(source):
        raise UserError(f"{source} cannot be read here: {advice}")
    if re.match("(?i)https?://", source):
        return _open_url(source)
    if run := named_run(source):
        return _open_run(run)
    if path := _existing(source):
        return _open_folder(path) if path.is_dir() else _open_file(path)
    raise UserError(
        f"no weights {source!r}: not a published name, file, folder, run directory or URL; "
        f"{suggestions.for_name(source)}"
    )


def named_run(source: str | Path) -> NamedRun | None:
    """Returns the run that a source names, "runs/b16" or "runs/b16@best"; None if it names something else.

    A directory whose own name contains "@" is found before a part of its name is split off.
    """
    workdir = _existing(str(source))
    if workdir:
        return NamedRun(workdir, None) if is_run(workdir) else None
    name, _, checkpoint = str(source).rpartition("@")
    workdir = _existing(name) if name and checkpoint else None
    return NamedRun(workdir, checkpoint) if workdir and is_run(workdir) else None


# --- one function for each kind of source


def _open_published(name: str) -> Weights:
    published = PUBLISHED[name]
    file = _download(lambda: fetch(published.url, size_mib=published.size_mib))
    return with_origin(open_weights(file), published.origin)


def _open_url(url: str) -> Weights:
    weights = open_weights(_download(lambda: fetch(url)))
    if published := published_as(url):
        return with_origin(weights, published.origin)
    if hub_file := _HUB_FILE.fullmatch(_without_query(url)):
        note = f"for the config.json of these weights, give hf-hub:{hub_file[1]}@{hub_file[2]}"
        weights = replace(weights, notes=(*weights.notes, note))
    return with_origin(weights, {})


def _open_hub_model(model: hub.Model) -> Weights:
    file = _download(lambda: hub.get_file(model, hub.WEIGHTS_FILE))
    if file is None:
        raise UserError(
            f"{model} has no {hub.WEIGHTS_FILE}: choose another model, or convert its weights to safetensors and "
            "give the file (a pickle, such as pytorch_model.bin, is never read)"
        )
    if published := published_as(str(model)):
        return with_origin(open_weights(file), published.origin)
    return _with_config_file(open_weights(file), _download(lambda: hub.get_file(model, hub.CONFIG_FILE)))


def _open_run(named: NamedRun) -> Weights:
    checkpoint = named.checkpoint or default_checkpoint(named.workdir)
    run = open_run(named.workdir, checkpoint, check=partial(check_shapes, name=shown(named.workdir)))
    flat: dict[str, Any] = flatten_dict(run.params, sep="/")
    weights = Weights(
        name=shown(named.workdir),
        shapes={name: array.shape for name, array in flat.items()},
        unknown=(),
        metadata={
            "model": run.config["model"],
            "preprocess": run.config["preprocess"],
            "class_names": run.class_names,
            "loss": run.config["loss"],
        },
        layout="google",
        read=flat.__getitem__,
        notes=(describe_weights(named.workdir, checkpoint, step=run.step),),
    )
    # A run of an earlier version lacks keys, and a damaged one may have any values.
    return with_origin(weights, {})


def _open_folder(folder: Path) -> Weights:
    """Opens a folder that is no run: one with the files of a hub model, of which config.json may be missing."""
    try:
        files = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read ({error.strerror}): check its permissions") from None
    if hub.WEIGHTS_FILE in files:
        return _open_file(folder / hub.WEIGHTS_FILE)
    read_config(folder)  # raises an error if its config.json is damaged
    what = f"{shown(folder)} is neither a run directory nor a folder of weights with a {hub.WEIGHTS_FILE}"
    if folder.parent.name == "checkpoints" and is_run(folder.parent.parent):
        raise UserError(f"{what}, but a checkpoint: give {shown(folder.parent.parent)}@{folder.name}")
    if f"{hub.WEIGHTS_FILE}.index.json" in files:
        raise UserError(f"{what}: join the parts of its weights into one file")
    for name in files:
        if name.endswith((".npz", ".safetensors")):
            raise UserError(f"{what}: give the file itself, such as {shown(folder / name)}")
    for name in files:
        if name.endswith(_PICKLES):
            raise UserError(
                f"{what}: convert its {name}, a pickle, which runs as code, to safetensors (docs/weights.md shows how)"
            )
    raise UserError(f"{what}: give the directory that --workdir named in training, or a file of weights")


def _open_file(file: Path) -> Weights:
    """Opens a file; a config.json beside it belongs to it if the file has the name of a hub model's weights."""
    beside = file.with_name(hub.CONFIG_FILE)
    belongs = file.name == hub.WEIGHTS_FILE and beside.is_file() and not is_run(file.parent)
    weights = open_weights(file)
    return _with_config_file(weights, beside) if belongs else with_origin(weights, {})


# --- what they share


def _synonym(source: str | Path) -> str:
    """Returns a source as text, with timm's older prefix hf_hub: replaced by hf-hub:."""
    return re.sub("^hf_hub:", "hf-hub:", str(source))


def _existing(source: str) -> Path | None:
    """Returns the path that a source is, if it exists; of a remote path, that of its copy."""
    try:
        if (copy := copy_of(source)) and not suggestions.for_address(source):
            return fetch_run(copy)
        path = Path(source).expanduser()
        check_reachable(path)
        return path if source and path.exists() else None
    except (NothingThere, OSError, RuntimeError):  # the name is too long, or ~ has no home directory
        return None


def _without_query(url: str) -> str:
    return url.partition("#")[0].partition("?")[0]


def _download(get: Callable[[], Any]) -> Any:
    """Returns what `get` returns; if a download fails, its error names the ways without one."""
    try:
        return get()
    except DownloadError as error:
        raise UserError(
            f"{error}; without a download: give a file that you have, with --config.init_from=PATH in training (for a "
            f"teacher --config.distill_from=PATH) or --weights=PATH, or copy the cache of another computer to "
            f"{error.cache}, or train from random weights, with --config.init_from="
        ) from None


def _with_config_file(weights: Weights, file: Path | None) -> Weights:
    """Returns weights with what timm's config.json beside them says; None = there is no such file."""
    if file is None:
        return with_origin(weights, {})
    origin = timm_config.read(file, weights)
    return with_origin(replace(weights, notes=(*weights.notes, *origin.notes)), origin.metadata)


def _grid(weights: Weights) -> tuple[int, int] | None:
    """Returns (rows, columns) of the tokens that the weights were trained with, or None if unknown."""
    size_px = weights.metadata["preprocess"].get("image_size_px")
    kernel = weights.shapes.get("stem/kernel")
    return (size_px // kernel[0], size_px // kernel[1]) if size_px and kernel else None
