"""Files of Mixer weights: Google's npz in both its dialects and timm's safetensors, read and written.

Array by array, so that a large file takes little more memory than its arrays. A file may be hostile: nothing
is unpickled or extracted, and a size is checked before memory is taken for it.
"""

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing

# Names of every parameter: ours and Google's (Linen); Google's before Linen; timm's. Below, * is a block.
_OURS, _PRE_LINEN, _TIMM = range(3)
_BLOCK = ("MixerBlock_{i}", "Mixer/encoderblock_{i}", "blocks.{i}")
_NAMES = [
    tuple(name.replace("*", block) for name, block in zip(row.split(), _BLOCK, strict=True))
    for row in """
stem/kernel                      embedding/kernel                  stem.proj.weight
stem/bias                        embedding/bias                    stem.proj.bias
*/LayerNorm_0/scale              */LayerNorm_0/scale               *.norm1.weight
*/LayerNorm_0/bias               */LayerNorm_0/bias                *.norm1.bias
*/token_mixing/Dense_0/kernel    */token_mixing_phase_0/kernel1    *.mlp_tokens.fc1.weight
*/token_mixing/Dense_0/bias      */token_mixing_phase_0/bias1      *.mlp_tokens.fc1.bias
*/token_mixing/Dense_1/kernel    */token_mixing_phase_0/kernel2    *.mlp_tokens.fc2.weight
*/token_mixing/Dense_1/bias      */token_mixing_phase_0/bias2      *.mlp_tokens.fc2.bias
*/LayerNorm_1/scale              */LayerNorm_1/scale               *.norm2.weight
*/LayerNorm_1/bias               */LayerNorm_1/bias                *.norm2.bias
*/channel_mixing/Dense_0/kernel  */channel_mixing_phase_0/kernel1  *.mlp_channels.fc1.weight
*/channel_mixing/Dense_0/bias    */channel_mixing_phase_0/bias1    *.mlp_channels.fc1.bias
*/channel_mixing/Dense_1/kernel  */channel_mixing_phase_0/kernel2  *.mlp_channels.fc2.weight
*/channel_mixing/Dense_1/bias    */channel_mixing_phase_0/bias2    *.mlp_channels.fc2.bias
pre_head_layer_norm/scale        Mixer/encoder_norm/scale          norm.weight
pre_head_layer_norm/bias         Mixer/encoder_norm/bias           norm.bias
head/kernel                      head/kernel                       head.weight
head/bias                        head/bias                         head.bias
""".strip().splitlines()
]
_ROWS = [{row[column]: row for row in _NAMES} for column in range(3)]

# By the number of axes, where those of our layout stand in timm's: (out, in), (out, in, h, w).
_TIMM_AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # by safetensors' names

# What a member of a zip may not be: how to tell, what it is, the remedy.
_REFUSED = (
    (lambda member: member.filename.endswith(".pkl"), "a pickle, which runs as code",
     "convert the file to safetensors first"),
    (lambda member: not member.filename.endswith(".npy"), "which is not an array (.npy)",
     "give an npz of weights"),
    (lambda member: re.search(r"^/|\\|(^|/)\.\./", member.filename), "a path out of the archive",
     "get the file from a source you trust"),
    (lambda member: member.flag_bits & 1, "which is encrypted", "write the npz again without a password"),
    # zipfile limits what it unpacks at once for these two only.
    (lambda member: member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
     "compressed as NumPy never does", "write the npz again with np.savez"),
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Parameters that are read one at a time, by our names: `MixerBlock_0/token_mixing/Dense_0/kernel`."""

    name: str  # the file, for messages
    shapes: Mapping[str, tuple[int, ...]]  # by our names, in our layout
    unknown: tuple[str, ...]  # names in the file that no Mixer has, sorted
    metadata: Mapping[str, Any]  # as given to write_npz or write_safetensors; empty in other files
    layout: str  # "google" or "timm"
    read: Callable[[str], np.ndarray]  # our name -> float32, C-contiguous, finite; UserError where damaged


def open_weights(path: Path) -> Weights:
    """Weights of any of the three layouts, in an npz or a safetensors file; reads the headers only.

    The container is told by its first bytes and the layout by its names, so a file may be called anything.
    float16, bfloat16, float32 and float64 are accepted. Raises UserError, naming the file and the remedy,
    for what is not such a file, is damaged, or would unpack to 4 times its size and 1 GiB more.
    """
    with _readable(path):
        headers, metadata, read_stored = _container(path)(path)
        metadata = json.loads(metadata)
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
        layout = max(range(3), key=lambda column: sum(_renamed(name, column) is not None for name in headers))
        places = {  # our name -> name and shape in the file, without axes to squeeze; our axes in it
            ours: (name, *_placed(path, name, headers[name], ours, layout))
            for name in headers
            if (ours := _renamed(name, layout))
        }
        if not places:
            names = ", ".join(f"{name!r:.80}" for name in sorted(headers)[:3])
            raise UserError(f"{path} holds no Mixer weights (but {names or 'nothing'}): give another file")

    def read(ours: str) -> np.ndarray:
        name, shape, axes = places[ours]
        with _readable(path), np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite
            array = read_stored(name).astype(np.float32, copy=False)
            array = np.ascontiguousarray(array.reshape(shape).transpose(axes))
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds NaN or infinity as float32: get weights that do not")
        return array

    return Weights(
        name=str(path),
        shapes={ours: tuple(shape[axis] for axis in axes) for ours, (_, shape, axes) in places.items()},
        unknown=tuple(sorted(name for name in headers if not _renamed(name, layout))),
        metadata=metadata,
        layout="timm" if layout == _TIMM else "google",
        read=read,
    )


def write_npz(path: Path, params: Mapping[str, Any], *, metadata: Mapping[str, Any]) -> list[str]:
    """Writes our tree of float32 arrays in Google's layout, uncompressed; same content, same bytes.

    The metadata goes, as JSON, into the comment of the archive, where `np.load` doesn't look. Its
    "class_names" are left out if they don't fit, and the sentence that says so is returned. Raises UserError
    where the file cannot be written.
    """
    arrays, said = _arrays(params), []
    comment = _json(metadata)
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        said.append(
            f"{path} is written without class names: its metadata would take {len(comment):,} bytes, an npz "
            f"holds {zipfile.ZIP_MAX_COMMENT:,}; safetensors has room for them"
        )
        comment = _json({key: metadata[key] for key in metadata if key != "class_names"})
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise UserError(f"{path} cannot hold {len(comment):,} bytes of metadata: write safetensors instead")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = comment
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, whatever the day
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, _float32(array), allow_pickle=False)
    return said


def write_safetensors(path: Path, params: Mapping[str, Any], *, metadata: Mapping[str, Any]) -> list[str]:
    """Writes our tree of float32 arrays in timm's layout; same content, same bytes.

    The metadata stands, as JSON, under "mlpmixer_flax" in the header's own. Returns sentences to say aloud,
    as write_npz, but has none. Raises UserError where the file cannot be written.
    """
    # The library's own writer wants all transposed arrays at once and shuffles metadata. The format is a
    # header and the arrays' bytes (README of huggingface/safetensors, "Format").
    views = {
        _renamed(name, _OURS, _TIMM): np.asarray(array).transpose(np.argsort(_TIMM_AXES[array.ndim]))
        for name, array in _arrays(params).items()
    }
    header = {"__metadata__": {"format": "pt", "mlpmixer_flax": _json(metadata).decode()}}
    end = 0
    for name, view in views.items():
        start, end = end, end + 4 * view.size
        header[name] = {"dtype": "F32", "shape": view.shape, "data_offsets": (start, end)}
    head = _json(header)
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for view in views.values():
            file.write(_float32(view))
    return []


def _renamed(name: str, source: int, target: int = _OURS) -> str | None:
    """A parameter's name in another column; None for a name that isn't in this one."""
    block = re.search("0|[1-9][0-9]*", name)  # where a name has a block, it is its first number
    block = block[0] if block else ""
    row = _ROWS[source].get(name.replace(block, "{i}", 1) if block else name)
    return row and row[target].replace("{i}", block)


def _placed(path: Path, name: str, header: tuple[tuple[int, ...], str], ours: str, layout: int):
    """An array's shape in the file, without extra axes of length 1, and those axes in our order."""
    shape, dtype = header
    if dtype not in _DTYPES.values():
        raise UserError(f"{path}: {name} is of type {dtype}: convert it to float32 first")
    num_axes = 4 if ours == "stem/kernel" else 2 if ours.endswith("/kernel") else 1
    squeezed = list(shape)
    while len(squeezed) > num_axes and 1 in squeezed:
        squeezed.remove(1)  # the first: before Linen they led, and a later one may be a stem's only channel
    if len(squeezed) != num_axes or min(squeezed) < 1:
        raise UserError(f"{path}: {name} of shape {shape} is no such parameter of a Mixer: give another file")
    return squeezed, _TIMM_AXES[num_axes] if layout == _TIMM else tuple(range(num_axes))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy's header parser and safetensors each have their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)
        raise UserError(f"{path} cannot be read ({reason:.150}): check the path, or get it again") from None


def _container(path: Path) -> Callable:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        return _open_npz
    if start.endswith(b"{"):  # after the 8 bytes of the header's length
        return _open_safetensors
    if start.startswith(b"\x80"):
        raise UserError(f"{path} is a pickle, which runs as code: convert it to safetensors first")
    raise UserError(f"{path} is neither npz nor safetensors: check what you downloaded, or get it again")


def _open_npz(path: Path):
    """(shape, dtype) by name, the metadata as JSON, and a function that reads one array as it is."""
    archive = zipfile.ZipFile(path)  # stays open as long as that function lives
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    for member in archive.infolist():
        for holds, what, remedy in _REFUSED:
            if holds(member):
                raise UserError(f"{path} holds {member.filename!r:.80}, {what}: {remedy}")
    if len(members) < len(archive.infolist()):
        raise ValueError("two arrays have the same name")
    unpacked_bytes = sum(member.file_size for member in members.values())
    # Trained weights hardly compress; a fresh head, all zeros, does so a thousandfold.
    if unpacked_bytes > 4 * path.stat().st_size + 2**30:
        raise UserError(
            f"{path} would unpack to {unpacked_bytes:,} bytes, far more than weights do: do not trust it, "
            "or write it again uncompressed"
        )
    headers = {}
    for name, member in members.items():
        with archive.open(member) as file:
            if np.lib.format.read_magic(file) != (1, 0):  # as NumPy writes every array of numbers
                raise ValueError(f"{name!r:.80} has an unknown npy version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
                raise ValueError(f"{name!r:.80} holds more or less than its header says")
        # big_vision's bfloat16: npy has no name for it, and stores two raw bytes.
        headers[name] = shape, "bfloat16" if dtype.name == "void16" else dtype.name

    def read(name: str) -> np.ndarray:
        with archive.open(members[name]) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return array.view(jnp.bfloat16) if headers[name][1] == "bfloat16" else array

    return headers, archive.comment if archive.comment.startswith(b"{") else "{}", read


def _open_safetensors(path: Path):
    """The same of a safetensors file; the library checks its header."""
    file = safe_open(path, "numpy", backend="pread")  # mapped, a file takes memory twice, and can SIGBUS
    headers = {}
    for name in file.keys():
        array = file.get_slice(name)
        headers[name] = tuple(array.get_shape()), _DTYPES.get(array.get_dtype(), array.get_dtype())
    return headers, (file.metadata() or {}).get("mlpmixer_flax", "{}"), file.get_tensor


def _arrays(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of our tree by name, in an order that doesn't depend on the tree's."""
    arrays = dict(sorted(flatten_dict(params, sep="/").items()))
    for name in arrays:
        if not _renamed(name, _OURS):
            raise UserError(f"{name!r} is no parameter of a Mixer: give the tree under variables['params']")
    return arrays


def _float32(array: Any) -> np.ndarray:
    return np.ascontiguousarray(array, dtype="<f4")


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(content), sort_keys=True).encode()
