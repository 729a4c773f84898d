"""Reads and writes files of Mixer weights: Google's npz, in its two sets of names, and timm's safetensors.

Arrays are read and written one by one, so a large file takes little more memory than its arrays. A file may
be hostile: nothing is unpickled or extracted, and every size is checked before memory is allocated for it.
"""

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.faults import in_one_line, pass_on
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.weights.names import OURS, TIMM, find_parameters, renamed

Shape = tuple[int, ...]

# Number of axes -> where our axes are in timm's layout, which is (out, in) and (out, in, h, w).
_TIMM_AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # by safetensors' names

# Members of a zip that are refused: how to tell, what they are, the remedy.
_REFUSED = (
    (lambda member: member.filename.endswith(".pkl"), "a pickle, which runs as code",
     "convert the file to safetensors first"),
    (lambda member: not member.filename.endswith(".npy"), "which is not an array (.npy)",
     "give an npz of weights"),
    (lambda member: re.search(r"^/|\\|(^|/)\.\./", member.filename), "a path that leaves the archive",
     "get the file from a source you trust"),
    (lambda member: member.flag_bits & 1, "which is encrypted", "write the npz again without a password"),
    # Only for these two does zipfile limit how much it unpacks at once.
    (lambda member: member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
     "compressed as NumPy never does", "write the npz again with np.savez"),
)  # fmt: skip
# Other files that people have of a model: bytes in their first 64 KiB, what they are, the remedy.
_OTHER_FORMATS = (
    (rb"\A(?:[\x81-\x8f]|\xde..)[\xa1-\xbf\xd9]", "a MessagePack file, such as flax.serialization writes",
     "convert it to npz (docs/migration.md shows how)"),
    (rb"\A\x80", "a pickle, which runs as code", "convert it to safetensors first"),
    (rb"ML\xefR.{0,9}StableHLO", "a stablehlo file, from which no weights can be read",
     "export the run again, with --format=npz or safetensors"),
    (rb"\A\x89HDF", "an HDF5 file", "convert it to safetensors first"),
    (rb"\Aversion https://git-lfs", "neither npz nor safetensors, but a pointer of Git LFS to such a file",
     "run git lfs pull in its repository"),
    (rb"\A\s*<(?i:!doctype|html|\?xml)", "neither npz nor safetensors, but a web page",
     "download the file itself, not the page about it"),
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Parameters that are read one at a time, by our names: `MixerBlock_0/token_mixing/Dense_0/kernel`."""

    name: str  # the file, for messages
    shapes: Mapping[str, Shape]  # by our names, in our layout
    unknown: tuple[str, ...]  # names of the model in the file that no Mixer has, sorted
    metadata: Mapping[str, Any]  # as given to write_npz or write_safetensors; empty in other files
    layout: str  # "google" or "timm"
    read: Callable[[str], np.ndarray]  # our name -> float32, C-contiguous, finite; UserError if it is damaged
    notes: tuple[str, ...] = ()  # sentences for the user about what is not used, assumed or contradicted


class _Container(NamedTuple):
    """An opened npz or safetensors file, whatever its arrays are for."""

    shapes: Mapping[str, Shape]  # by the names in the file
    dtypes: Mapping[str, str]  # NumPy's names, or safetensors' where NumPy has none
    metadata: str | bytes  # JSON
    read: Callable[[str], np.ndarray]  # name in the file -> array as stored


def open_weights(path: Path) -> Weights:
    """Opens weights in any of the three layouts, in an npz or a safetensors file; reads only the headers.

    The first bytes tell the container and the names of the arrays tell the layout, so the file may have any
    name. Arrays may be float16, bfloat16, float32 or float64. What other programs put around the names and
    beside the weights is handled by `names.find_parameters`.

    Raises:
      UserError: the file holds no Mixer weights or several, is damaged, or unpacks to over 4 times its size +
        256 MiB.
    """
    with _readable(path):
        container = _open_container(path)
        metadata = json.loads(container.metadata)
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
        names = container.shapes.keys()
        found = find_parameters(names, str(path))
        if not found:
            first = ", ".join(f"{name!r:.80}" for name in sorted(names)[:3]) or "none"
            raise UserError(f"{path} holds no Mixer weights (its arrays: {first}): give another file")
        places = {  # our name -> name and shape in the file, without axes to squeeze; our axes in that shape
            ours: (name, *_placed(path, name, container, ours=ours, layout=found.layout))
            for ours, name in found.names.items()
        }

    def read(ours: str) -> np.ndarray:
        name, shape, axes = places[ours]
        with _readable(path), np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
            array = container.read(name).astype(np.float32, copy=False)
            array = np.ascontiguousarray(array.reshape(shape).transpose(axes))
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity as float32: get weights without them")
        return array

    return Weights(
        name=str(path),
        shapes={ours: tuple(shape[axis] for axis in axes) for ours, (_, shape, axes) in places.items()},
        unknown=found.unknown,
        metadata=metadata,
        layout="timm" if found.layout == TIMM else "google",
        read=read,
        notes=(found.note,) if found.note else (),
    )


def write_npz(path: Path, params: Mapping[str, Any], *, metadata: Mapping[str, Any]) -> list[str]:
    """Writes our tree of float32 arrays in Google's layout, uncompressed; same content, same bytes.

    The metadata becomes the comment of the archive, as JSON; `np.load` ignores it.

    Returns:
      Sentences for the user: one if the metadata's "class_names" did not fit and were left out, else none.

    Raises:
      UserError: the tree has parameters that no Mixer has, or the file cannot be written.
    """
    arrays, notes = _arrays(params), []
    comment = _json(metadata)
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        notes.append(
            f"{path} is written without class names: its metadata would take {len(comment):,} bytes, an npz "
            f"holds {zipfile.ZIP_MAX_COMMENT:,}; safetensors has room for them"
        )
        comment = _json({key: metadata[key] for key in metadata if key != "class_names"})
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise UserError(f"{path} cannot hold {len(comment):,} bytes of metadata: write safetensors instead")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = comment
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # always dated 1980
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _float32(array), allow_pickle=False)
    return notes


def write_safetensors(path: Path, params: Mapping[str, Any], *, metadata: Mapping[str, Any]) -> list[str]:
    """Writes our tree of float32 arrays in timm's layout; same content, same bytes.

    The metadata becomes JSON under the key "mlpmixer_flax" in the metadata of the header. Result and errors
    are as of `write_npz`, except that class names always fit.
    """
    # The library's own writer needs all transposed arrays at once and writes metadata in random order. The
    # format is a header and the bytes of the arrays (README of huggingface/safetensors, "Format").
    views = {
        str(renamed(name, OURS, TIMM)): np.asarray(array).transpose(np.argsort(_TIMM_AXES[array.ndim]))
        for name, array in _arrays(params).items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "mlpmixer_flax": _json(metadata).decode()}}
    end = 0
    for name, view in views.items():
        start, end = end, end + 4 * view.size
        header[name] = {"dtype": "F32", "shape": view.shape, "data_offsets": (start, end)}
    head = _json(header)
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for view in views.values():
            file.write(_float32(view).data)
    return []


def _placed(path: Path, name: str, container: _Container, *, ours: str, layout: int) -> tuple[Shape, Shape]:
    """Returns an array's shape in the file, without extra axes of length 1, and those axes in our order."""
    shape, dtype = container.shapes[name], container.dtypes[name]
    if dtype not in _DTYPES.values():
        raise UserError(f"{path}: {name} is of type {dtype}: convert it to float32 first")
    num_axes = 4 if ours == "stem/kernel" else 2 if ours.endswith("/kernel") else 1
    squeezed = list(shape)
    while len(squeezed) > num_axes and 1 in squeezed:
        squeezed.remove(1)  # the first 1: before Linen extra axes came first; a later 1 may be gray channels
    if len(squeezed) != num_axes or min(squeezed) < 1:
        raise UserError(f"{path}: {name} has shape {shape}, which is wrong for a Mixer: give another file")
    return tuple(squeezed), _TIMM_AXES[num_axes] if layout == TIMM else tuple(range(num_axes))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy's header parser and safetensors all raise their own
        pass_on(error, path)
        reason = getattr(error, "strerror", None) or in_one_line(error)
        raise UserError(f"{path} cannot be read ({reason}): check the path, or get it again") from None


def _open_container(path: Path) -> _Container:
    with open_file(path) as file:
        start = file.read(2**16)
    if start.startswith(b"PK"):
        return _open_npz(path)
    if start[8:9] == b"{":  # the header starts after 8 bytes that hold its length
        return _open_safetensors(path)
    for pattern, what, remedy in _OTHER_FORMATS:
        if re.search(pattern, start, re.DOTALL):
            raise UserError(f"{path} is {what}: {remedy}")
    raise UserError(f"{path} is neither npz nor safetensors: check what you downloaded, or get it again")


def _open_npz(path: Path) -> _Container:
    archive = zipfile.ZipFile(path)  # open as long as `read` below exists
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    for member in archive.infolist():
        for holds, what, remedy in _REFUSED:
            if holds(member):
                raise UserError(f"{path} holds {member.filename!r:.80}, {what}: {remedy}")
    if len(members) < len(archive.infolist()):
        raise ValueError("two arrays have the same name")
    unpacked_bytes = sum(member.file_size for member in members.values())
    # Trained weights hardly compress, but a new head, all zeros, compresses a thousandfold.
    if unpacked_bytes > 4 * path.stat().st_size + 2**28:
        raise UserError(
            f"{path} would unpack to {unpacked_bytes:,} bytes, far more than weights do: do not trust it, "
            "or write it again without compression"
        )
    shapes, dtypes = {}, {}
    for name, member in members.items():
        with archive.open(member) as file:
            if np.lib.format.read_magic(file) != (1, 0):  # the version for all arrays of numbers
                raise ValueError(f"{name!r:.80} has an unknown npy version")
            try:
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            except MemoryError:  # from Python's parser, for nesting that is too deep
                raise ValueError(f"{name!r:.80} has a header that is not NumPy's") from None
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise ValueError(f"{name!r:.80} holds more or less than its header says")
        # big_vision writes bfloat16. The npy format has no name for it and stores two raw bytes.
        shapes[name], dtypes[name] = shape, "bfloat16" if dtype.name == "void16" else dtype.name

    def read(name: str) -> np.ndarray:
        with archive.open(members[name]) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return array.view(jnp.bfloat16) if dtypes[name] == "bfloat16" else array

    return _Container(shapes, dtypes, archive.comment if archive.comment.startswith(b"{") else "{}", read)


def _open_safetensors(path: Path) -> _Container:
    # The library checks the header. A file mapped into memory would take memory twice and could cause SIGBUS.
    file = safe_open(path, "numpy", backend="pread")
    arrays = {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: tuple(array.get_shape()) for name, array in arrays.items()}
    dtypes = {name: str(array.get_dtype()) for name, array in arrays.items()}
    dtypes = {name: _DTYPES.get(dtype, dtype) for name, dtype in dtypes.items()}
    return _Container(shapes, dtypes, (file.metadata() or {}).get("mlpmixer_flax", "{}"), file.get_tensor)


def _arrays(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of our tree by name, sorted, so the order in the tree doesn't matter."""
    arrays = dict(sorted(flatten_dict(params, sep="/").items()))
    for name in arrays:
        if not renamed(name, OURS):
            raise UserError(f"{name!r} is not a Mixer parameter: give the tree under variables['params']")
    return arrays


def _float32(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array, dtype="<f4")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(content), sort_keys=True).encode()
