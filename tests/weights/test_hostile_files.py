"""Hostile and damaged files of weights are refused in one sentence, without taking memory."""

import io
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import flax
import numpy as np
import pytest
from golden_weights import CONTAINERS, golden, read_all, refusal, save_npz
from safetensors.numpy import save_file

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.files import open_weights


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def npy(shape, data, dtype="<f4"):
    file = io.BytesIO()
    header = {"shape": shape, "fortran_order": False, "descr": dtype}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def zip_of(path, members, *, compression=zipfile.ZIP_STORED, comment=b"", **forged):
    """Writes an archive of bytes; its directory has the `forged` fields for every member."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.comment = comment
        for name, data in members:
            archive.writestr(name, data)
        for member in archive.infolist():
            for field, value in forged.items():
                setattr(member, field, value)


def safetensors_of(path, header, data):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def tensor(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEAD = ("head/bias.npy", npy((4,), bytes(16)))
NO_WEIGHTS = {
    "a page": (
        lambda p: p.write_text("<html>404</html>"),
        "neither npz nor safetensors, but a web page: down",
    ),
    "another page": (
        lambda p: p.write_text("\n<!DOCTYPE html>\n"),
        "but a web page: download the file itself",
    ),
    "a pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "neither npz nor safetensors, but a pointer of Git LFS .*: run git lfs pull",
    ),
    "a Keras file": (
        lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"),
        "is an HDF5 file: convert it to safetensors",
    ),
    "a checkpoint of flax.training": (
        lambda p: p.write_bytes(flax.serialization.to_bytes(({"stem": np.zeros(3)}, {}, 7))),
        "is a MessagePack file, such as flax.serialization writes: convert it to npz",
    ),
    "a large tree in MessagePack": (
        lambda p: p.write_bytes(flax.serialization.msgpack_serialize({f"a{i}": i for i in range(20)})),
        "is a MessagePack file",
    ),
    "an empty file": (lambda p: p.touch(), "neither npz nor safetensors"),
    "a folder": (lambda p: p.mkdir(), "Is a directory"),
    "nothing": (lambda p: None, "No such file"),
    "an array": (lambda p: p.write_bytes(HEAD[1]), "neither npz nor safetensors"),
    "an old pickle": (
        lambda p: p.write_bytes(b"\x80\x02}q\x00(X\x04\x00\x00\x00"),
        "convert it to safetensors",
    ),
    "a pickle": (
        lambda p: zip_of(p, [("archive/data.pkl", b"\x80\x02}."), ("archive/data/0", b"1234")]),
        "convert the file to safetensors",
    ),
    "an empty archive": (lambda p: zip_of(p, []), "holds no Mixer weights .its arrays: none.: give"),
    "other weights": (
        lambda p: save_file({"conv1": np.zeros(3)}, p),
        "holds no Mixer weights .its arrays: 'conv1'.: give",
    ),
    "a document": (lambda p: zip_of(p, [("word/document.xml", b"<a/>")]), "not an array .*give an npz"),
    "a JSON": (lambda p: p.write_text('{"model": {"gelu": "tanh"}}'), "neither npz nor safetensors"),
}
HOSTILE_ZIPS = {
    "object array": (lambda p: save_npz({"head/bias": np.array([Trap()])}, p), "head/bias is of type object"),
    "integers": (lambda p: save_npz({"head/bias": np.arange(3)}, p), "is of type int64: convert"),
    "complex": (lambda p: save_npz({"head/bias": np.ones(3, "c8")}, p), "is of type complex64"),
    "strings": (lambda p: save_npz({"head/bias": np.array(["a"])}, p), "is of type str32"),
    "upwards": (lambda p: zip_of(p, [HEAD, ("../../x.npy", HEAD[1])]), "a path that leaves the archive"),
    "up inside": (lambda p: zip_of(p, [HEAD, ("a/../../x.npy", HEAD[1])]), "a path that leaves the archive"),
    "absolute": (lambda p: zip_of(p, [HEAD, ("/x.npy", HEAD[1])]), "a path that leaves the archive"),
    "Windows path": (lambda p: zip_of(p, [HEAD, ("..\\x.npy", HEAD[1])]), "a path that leaves the archive"),
    "duplicate": (lambda p: zip_of(p, [HEAD, HEAD]), "two arrays have the same name"),
    "encrypted": (lambda p: zip_of(p, [HEAD], flag_bits=1), "is encrypted: write the npz again"),
    "bzip2": (lambda p: zip_of(p, [HEAD], compression=zipfile.ZIP_BZIP2), "compressed as NumPy never does"),
    "declared bomb": (
        lambda p: zip_of(p, [("head/kernel.npy", npy((2**26, 8), b""))], file_size=2**31 + 128),
        "would unpack to 2,147,483,776 bytes",
    ),
    "bomb behind the array": (
        lambda p: zip_of(p, [(HEAD[0], HEAD[1] + bytes(10**8))], compression=zipfile.ZIP_DEFLATED),
        "holds more or less than its header says",
    ),
    "undeclared bomb": (
        lambda p: zip_of(
            p, [(HEAD[0], HEAD[1] + bytes(10**8))], compression=zipfile.ZIP_DEFLATED, file_size=len(HEAD[1])
        ),
        "Bad CRC-32",
    ),
    "shape beyond the data": (lambda p: zip_of(p, [("head/bias.npy", npy((10**12,), b"1234"))]), "than its"),
    "no numbers": (lambda p: zip_of(p, [("head/bias.npy", npy((0,), b""))]), "shape .0,., which is wrong"),
    "negative shape": (lambda p: zip_of(p, [("head/kernel.npy", npy((-2, -2), bytes(16)))]), "is wrong"),
    "too few axes": (
        lambda p: zip_of(p, [("head/kernel.npy", npy((4,), bytes(16)))]),
        "which is wrong for a Mixer",
    ),
    "too many axes": (
        lambda p: zip_of(p, [("head/bias.npy", npy((2, 2), bytes(16)))]),
        "which is wrong for a Mixer",
    ),
    "no npy": (lambda p: zip_of(p, [("head/bias.npy", b"hello")]), "cannot be read"),
    "npy 2": (lambda p: zip_of(p, [("head/bias.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f")]), "unknown npy"),
    "header of code": (
        lambda p: zip_of(p, [("head/bias.npy", b"\x93NUMPY\x01\x00\x28\x23" + b"-" * 8999 + b"1")]),
        "cannot be read",
    ),
    "damaged metadata": (lambda p: zip_of(p, [HEAD], comment=b'{"model": '), "Expecting value"),
    "deep metadata": (lambda p: zip_of(p, [HEAD], comment=b'{"":' * 16_000), "recursion depth"),
}
ONE = tensor("F32", [1], 0, 4)
HOSTILE_SAFETENSORS = {
    "integers": ({"head.bias": tensor("I64", [1], 0, 8)}, bytes(8), "head.bias is of type I64: convert"),
    "eight bits": ({"head.bias": tensor("F8_E4M3", [4], 0, 4)}, bytes(4), "is of type F8_E4M3"),
    "no numbers": ({"head.bias": tensor("F32", [0], 0, 0)}, b"", "which is wrong for a Mixer"),
    "negative": ({"head.bias": tensor("F32", [-1], 0, 4)}, bytes(4), "deserializing header"),
    "huge": ({"head.weight": tensor("F32", [2**62, 2**62], 0, 4)}, bytes(4), "deserializing header"),
    "lying": ({"head.bias": tensor("F32", [2], 0, 4)}, bytes(4), "deserializing header"),
    "cut off": ({"head.bias": tensor("F32", [2], 0, 8)}, bytes(4), "deserializing header"),
    "overlapping": ({"head.bias": ONE, "norm.bias": ONE}, bytes(4), "deserializing header"),
    "trailing": ({"head.bias": ONE}, bytes(8), "deserializing header"),
    "no header": (b"{", b"", "deserializing header"),
    "no tensor": ({"head.bias": 7}, bytes(4), "deserializing header"),
    "damaged metadata": (
        {"__metadata__": {"mlpmixer_flax": "[1, 2"}, "head.bias": ONE}, bytes(4), "Expecting",
    ),
    "a list": ({"__metadata__": {"mlpmixer_flax": "[]"}, "head.bias": ONE}, bytes(4), "is no JSON object"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", [*NO_WEIGHTS, *HOSTILE_ZIPS])
def test_hostile_file_is_refused_in_a_sentence_without_taking_memory(tmp_path, monkeypatch, case):
    make, expected = {**NO_WEIGHTS, **HOSTILE_ZIPS}[case]
    path = tmp_path / "weights.npz"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    try:
        sentence = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(UserError, match=expected):
        raise UserError(sentence)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted or unpickled


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_is_refused_in_a_sentence(tmp_path, case):
    header, data, expected = HOSTILE_SAFETENSORS[case]
    safetensors_of(tmp_path / "a", header, data)
    assert expected in refusal(tmp_path / "a")


def test_metadata_of_other_programs_is_ignored(tmp_path):
    zip_of(tmp_path / "a.npz", [HEAD], comment=b"packed by hand")
    assert open_weights(tmp_path / "a.npz").metadata == {}
    save_file(golden("timm_tiny"), tmp_path / "a.safetensors", {"format": "pt", "author": "{"})
    assert open_weights(tmp_path / "a.safetensors").metadata == {}


@pytest.mark.parametrize("save", CONTAINERS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, save):
    save(golden("timm_tiny"), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in np.linspace(0, len(whole) - 1, 40, dtype=int):
        (tmp_path / "cut").write_bytes(whole[:length])
        refusal(tmp_path / "cut")


@pytest.mark.parametrize("save", CONTAINERS)
def test_damage_anywhere_gives_a_sentence_or_finite_weights(tmp_path, save):
    save({name: array for name, array in golden("timm_tiny").items() if "blocks" not in name}, tmp_path / "a")
    whole = np.fromfile(tmp_path / "a", np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        # Half of the damage is near the ends, where the headers are.
        reach = rng.choice([300, whole.size])
        places = rng.integers(-reach, reach, 3) % whole.size
        damaged[places] = rng.integers(0, 256, 3)
        damaged.tofile(tmp_path / "a")
        try:
            arrays = read_all(tmp_path / "a")
        except UserError:
            refused += 1
        else:
            assert all(np.isfinite(array).all() for array in arrays.values())
    assert refused > 30


@pytest.mark.parametrize("save", CONTAINERS)
def test_a_file_damaged_after_opening_is_refused_when_it_is_read(tmp_path, save):
    save(golden("timm_tiny"), tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    refusal(tmp_path / "a", lambda path: weights.read("head/kernel"))
