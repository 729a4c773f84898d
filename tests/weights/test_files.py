"""Files of Google and timm are read and written exactly."""

import json
import resource
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_weights import CONTAINERS, GOLDEN, golden, read_all, refusal
from safetensors.numpy import load_file, save_file

from mlpmixer_flax import UserError
from mlpmixer_flax.config import mixer_b16_config, mixer_l16_config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.files import open_weights, write_npz, write_safetensors

METADATA = {"model": {"gelu": "tanh"}, "class_names": ["cat", "été", "猫"], "mean": [0.5]}
WRITERS = {"google": write_npz, "timm": write_safetensors}


def tiny_params():
    return unflatten_dict(golden("google_tiny"), sep="/")


def assert_same_bits(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous, name
        assert array.shape == expected[name].shape, name
        assert array.tobytes() == np.asarray(expected[name]).tobytes(), name


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
