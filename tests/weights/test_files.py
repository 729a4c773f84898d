"""Files of Google and timm are read and written exactly; hostile ones are refused in one sentence."""

import io
import json
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from mlpmixer_flax import UserError
from mlpmixer_flax.config import mixer_b16_config, mixer_l16_config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.files import open_weights, write_npz, write_safetensors

GOLDEN = Path(__file__).parents[1] / "golden"
METADATA = {"model": {"gelu": "tanh"}, "class_names": ["cat", "été", "猫"], "mean": [0.5]}
WRITERS = {"google": write_npz, "timm": write_safetensors}


def golden(name):
    """Returns the arrays of a golden file as they are stored."""
    if name.startswith("timm"):
        return load_file(GOLDEN / f"{name}.safetensors")
    return dict(np.load(GOLDEN / f"{name}.npz"))


def save_npz(arrays, path):
    with path.open("wb") as file:  # given a path, NumPy would append .npz to the name
        np.savez(file, **arrays)


def save_compressed(arrays, path):
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


CONTAINERS = [save_npz, save_compressed, save_file]


def tiny_params():
    return unflatten_dict(golden("google_tiny"), sep="/")


def read_all(path):
    weights = open_weights(path)
    return {name: weights.read(name) for name in weights.shapes}


def assert_same_bits(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous, name
        assert array.shape == expected[name].shape, name
        assert array.tobytes() == np.asarray(expected[name]).tobytes(), name


def refusal(path, act=read_all):
    """Returns the sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        act(path)
    sentence = str(caught.value)
    assert str(path) in sentence and ": " in sentence and "\n" not in sentence and len(sentence) < 500
    return sentence


@pytest.mark.parametrize("save", CONTAINERS)
@pytest.mark.parametrize(
    ("name", "layout"), [("google_tiny", "google"), ("google_tiny_prelinen", "google"), ("timm_tiny", "timm")]
)
def test_every_layout_in_every_container_gives_the_originals_logits(tmp_path, name, layout, save):
    path = tmp_path / "weights.bin"
    save(golden(name), path)
    weights = open_weights(path)
    assert (weights.name, weights.layout) == (str(path), layout)
    assert weights.unknown == () and weights.metadata == {}

    family = name.removesuffix("_prelinen")
    sizes = json.loads((GOLDEN / f"{family}.json").read_text())
    known = np.load(GOLDEN / f"{family}_io.npz")
    images = known["images"] if layout == "google" else known["images_nchw"].transpose(0, 2, 3, 1)
    fields = {
        key: sizes[key] for key in ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim", "gelu")
    }
    fields["patches"] = {"size": (sizes["patch_size"],) * 2}
    model = MlpMixer(num_classes=sizes["num_classes"], **fields)
    ours = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert weights.shapes == {key: leaf.shape for key, leaf in flatten_dict(ours, sep="/").items()}

    params = {"params": unflatten_dict({key: weights.read(key) for key in weights.shapes}, sep="/")}
    features = MlpMixer(num_classes=0, **fields).apply(params, images)
    np.testing.assert_allclose(model.apply(params, images), known["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features, known["pre_logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", WRITERS)
def test_written_weights_are_read_bit_by_bit(tmp_path, layout):
    params = tiny_params()
    odd = np.array([-0.0, 0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1 / 3], np.float32)
    params["head"]["kernel"].flat[:8] = params["head"]["bias"][:8] = odd
    params["stem"]["kernel"] = np.asfortranarray(params["stem"]["kernel"])
    params["MixerBlock_1"] = jax.tree.map(jnp.asarray, params["MixerBlock_1"])
    params["MixerBlock_2"] = jax.tree.map(lambda array: array.astype(">f4"), params["MixerBlock_2"])
    path = tmp_path / "weights"
    assert WRITERS[layout](path, params, metadata=METADATA) == []
    weights = open_weights(path)
    assert weights.layout == layout and weights.metadata == METADATA and weights.unknown == ()
    expected = {name: np.asarray(array, "<f4") for name, array in flatten_dict(params, sep="/").items()}
    assert_same_bits(read_all(path), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_the_readers_of_numpy_and_safetensors_find_exactly_the_names_of_google_and_timm(tmp_path):
    write_npz(tmp_path / "a.npz", tiny_params(), metadata=METADATA)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as npz:
        assert_same_bits(dict(npz), golden("google_tiny"))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}

    params = unflatten_dict(read_all(GOLDEN / "timm_tiny.safetensors"), sep="/")
    write_safetensors(tmp_path / "a.safetensors", params, metadata=METADATA)
    assert_same_bits(load_file(tmp_path / "a.safetensors"), golden("timm_tiny"))


@pytest.mark.parametrize("layout", WRITERS)
def test_same_content_gives_the_same_bytes(tmp_path, layout):
    backwards = unflatten_dict(dict(reversed(flatten_dict(tiny_params()).items())))
    WRITERS[layout](tmp_path / "a", tiny_params(), metadata=METADATA)
    WRITERS[layout](tmp_path / "b", backwards, metadata=dict(reversed(METADATA.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    if layout == "google":  # else files written more than two seconds apart would differ
        with zipfile.ZipFile(tmp_path / "a") as archive:
            assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_class_names_that_do_not_fit_into_an_npz_are_left_out_with_a_note(tmp_path):
    metadata = {**METADATA, "class_names": [f"class number {i}" for i in range(21843)]}
    (note,) = write_npz(tmp_path / "a.npz", tiny_params(), metadata=metadata)
    assert "without class names" in note and "65,535" in note and "safetensors" in note
    kept = {key: METADATA[key] for key in ("model", "mean")}
    assert open_weights(tmp_path / "a.npz").metadata == kept
    assert write_safetensors(tmp_path / "a.safetensors", tiny_params(), metadata=metadata) == []
    assert open_weights(tmp_path / "a.safetensors").metadata == metadata
    too_long = {"model": "x" * 70_000}
    assert "70,013 bytes of metadata" in refusal(
        tmp_path / "b.npz", lambda path: write_npz(path, tiny_params(), metadata=too_long)
    )
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("layout", WRITERS)
def test_a_failed_write_leaves_the_old_file(tmp_path, layout):
    def write(path):
        WRITERS[layout](path, tiny_params(), metadata=METADATA)

    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("file/weights", "missing/weights", "folder", "x" * 300):
        assert "choose another place" in refusal(tmp_path / name, write)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # like a disk that becomes full half-way
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'file'}'"):
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("layout", WRITERS)
def test_a_tree_that_is_not_the_parameters_is_refused_before_writing(tmp_path, layout):
    with pytest.raises(UserError, match="'params/MixerBlock_0/LayerNorm_0/bias' is not a Mixer parameter"):
        WRITERS[layout](tmp_path / "a", {"params": tiny_params()}, metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", CONTAINERS)
@pytest.mark.parametrize(
    ("name", "stored", "ours"),
    [
        ("embedding/kernel", (4, 4, 1, 8), (4, 4, 1, 8)),  # grayscale
        ("embedding/kernel", (1, 4, 4, 1, 8), (4, 4, 1, 8)),
        ("embedding/kernel", (1, 1, 1, 4, 1, 8), (1, 4, 1, 8)),  # patches of one row
        ("Mixer/encoderblock_0/token_mixing_phase_0/kernel1", (1, 1, 6), (1, 6)),
        ("Mixer/encoderblock_11/channel_mixing_phase_0/bias2", (1, 1, 7), (7,)),
        ("Mixer/encoder_norm/scale", (1, 1), (1,)),
    ],
)
def test_only_the_extra_axes_of_files_from_before_linen_are_removed(tmp_path, name, stored, ours, save):
    array = np.arange(np.prod(stored), dtype=np.float32).reshape(stored)
    save({name: array, "Mixer/encoder_norm/bias": np.ones(3, np.float32)}, tmp_path / "a")
    (read,) = [array for key, array in read_all(tmp_path / "a").items() if key != "pre_head_layer_norm/bias"]
    assert read.shape == ours
    np.testing.assert_array_equal(read.ravel(), array.ravel())


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "bfloat16"])
@pytest.mark.parametrize("save", CONTAINERS)
def test_every_float_is_read_as_float32(tmp_path, dtype, save):
    array = np.array([[0, -0.0, 1 / 3], [-2, 1e-7, 6e4]]).astype(dtype)
    for order in (np.ascontiguousarray, np.asfortranarray) if save != save_file else (np.ascontiguousarray,):
        save({"head/kernel": order(array)}, tmp_path / "a")
        assert_same_bits(read_all(tmp_path / "a"), {"head/kernel": array.astype(np.float32)})


@pytest.mark.parametrize("save", CONTAINERS)
def test_names_that_no_mixer_has_are_listed_and_never_read(tmp_path, save):
    strange = {
        "stem/kernel": np.zeros(3, np.int32),  # Google's name, in a file of timm's
        "blocks.00.norm1.bias": np.zeros(3, np.float32),
        "blocks.{i}.norm1.bias": np.zeros(3, np.float32),
        "blocks.².norm1.bias": np.zeros(3, np.float32),
    }
    save({**golden("timm_tiny"), **strange, "step": np.array(7)}, tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    assert weights.unknown == tuple(sorted(strange)) and weights.layout == "timm"
    assert len(weights.shapes) == len(golden("timm_tiny"))
    assert weights.notes == ("other arrays of the file are not used: step (1)",)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("save", CONTAINERS)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, save):
    arrays = {"head/bias": np.array([1.0, value]), "head/kernel": np.ones((2, 2))}
    save(arrays, tmp_path / "a")
    weights = open_weights(tmp_path / "a")
    assert "head/bias holds NaN or infinity" in refusal(
        tmp_path / "a", lambda path: weights.read("head/bias")
    )
    assert weights.read("head/kernel").sum() == 4


# Hostile and damaged files


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


# Full size


def full_size_shapes(config, num_classes):
    model = MlpMixer(num_classes=num_classes, **config)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", WRITERS)
def test_a_full_size_b16_is_written_and_read(tmp_path, layout):
    rng, path = np.random.default_rng(0), tmp_path / "b16"
    shapes = full_size_shapes(mixer_b16_config, 1000)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    WRITERS[layout](path, params, metadata=METADATA)
    assert abs(path.stat().st_size / 2**20 - 228.47) < 0.1  # the published file
    weights = open_weights(path)
    for name, array in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(weights.read(name), array)
    path.unlink()


READ = """
import re, sys
from pathlib import Path
from mlpmixer_flax.weights.files import open_weights

def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kib("VmRSS")
weights = open_weights(Path(sys.argv[1]))
arrays = [weights.read(name) for name in weights.shapes]
assert all((array == 0.5).all() for array in arrays)
print(1024 * (kib("VmHWM") - before))
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("layout", "config", "num_classes", "file_mib"),
    [("google", mixer_l16_config, 21843, 875.78), ("timm", mixer_b16_config, 21843, 289.61)],
)
def test_reading_published_sizes_takes_little_more_memory_than_the_file(
    tmp_path, layout, config, num_classes, file_mib
):
    # VmHWM and not getrusage's ru_maxrss, which a child inherits from the process that started it.
    half = np.float32(0.5)
    params = jax.tree.map(
        lambda leaf: np.broadcast_to(half, leaf.shape), full_size_shapes(config, num_classes)
    )
    path = tmp_path / "weights"
    WRITERS[layout](path, params, metadata={})
    assert abs(path.stat().st_size / 2**20 - file_mib) < 0.1
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True)
    path.unlink()
    assert done.returncode == 0, done.stderr
    assert 1 < int(done.stdout) / 2**20 / file_mib < 1.3
