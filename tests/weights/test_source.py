"""Weights found by name: published names, files, URLs, the hub, runs."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmixer_flax import UserError, pretrained
from mlpmixer_flax.config import mixer_l16_config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.files import write_npz, write_safetensors

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = json.loads((GOLDEN / "google_tiny.json").read_text())


def tiny_model(gelu, **changes):
    fields = ("num_classes", "hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    return MlpMixer(
        **{**{name: SIZES[name] for name in fields}, **changes},
        patches={"size": (SIZES["patch_size"],) * 2},
        gelu=gelu,
    )


def shapes_of(model, size_px=32, channels=3):
    images = jnp.zeros((1, size_px, size_px, channels))
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


@pytest.fixture
def server(tmp_path):
    """Serves the folder tmp_path/served; `asked` lists the paths of all requests."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(self.path)

    httpd = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.folder, httpd.asked, httpd.url = folder, asked, f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("file", ["google_tiny.npz", "google_tiny_prelinen.npz", "timm_tiny.safetensors"])
def test_golden_weights_give_the_logits_and_features_of_the_original_code(file):
    timm = file.startswith("timm")
    io = np.load(GOLDEN / ("timm_tiny_io.npz" if timm else "google_tiny_io.npz"))
    images = io["images_nchw"].transpose(0, 2, 3, 1) if timm else io["images"]
    gelu = pretrained.describe(str(GOLDEN / file))["model"]["gelu"]
    model = tiny_model(gelu)
    params = pretrained.load(str(GOLDEN / file), shapes_of(model))
    logits = model.apply({"params": params}, images)
    features = tiny_model(gelu, num_classes=0).apply({"params": params}, images)
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features, io["pre_logits"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_in_mib_are_those_of_our_models(name):
    weights = PUBLISHED[name]
    model = MlpMixer(num_classes=weights.num_classes, **weights.origin["model"])
    size_mib = sum(4 * p.size for p in jax.tree.leaves(shapes_of(model, 224))) / 2**20
    if weights.size_mib:
        assert size_mib == pytest.approx(weights.size_mib, abs=0.1)  # the rest is headers
    assert pretrained.describe(name)["model"]["gelu"] == ("erf" if ".miil" in name else "tanh")


def test_the_table_has_the_values_of_the_references():
    google = {name: weights for name, weights in PUBLISHED.items() if not name.startswith("hf-hub:")}
    for name, weights in google.items():
        assert weights.url == f"https://storage.googleapis.com/mixer_models/{name}.npz"
        assert (weights.mean, weights.std, weights.interpolation) == ((0.5,), (0.5,), "bilinear")
    for name in PUBLISHED.keys() - google:
        weights = PUBLISHED[name]
        miil = ".miil" in name
        assert (weights.mean, weights.std) == (((0.0,), (1.0,)) if miil else ((0.5,), (0.5,)))
        assert weights.interpolation == ("bilinear" if miil else "bicubic") and weights.url == name
    assert len(google) == 11 and len(PUBLISHED) == 17


def test_published_weights_in_the_cache_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    name = "gsam/Mixer-S_32"
    model = MlpMixer(num_classes=1000, **PUBLISHED[name].origin["model"])
    with pytest.raises(UserError, match="Mixer-S_32.npz"):
        pretrained.load(name, shapes_of(model, 224))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes_of(model, 224))
    place = download.cache_file(PUBLISHED[name].url)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_npz(place, params, metadata={})
    loaded = pretrained.load(name, shapes_of(model, 224))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_url_is_downloaded_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    (server.folder / "tiny.npz").write_bytes((GOLDEN / "google_tiny.npz").read_bytes())
    url, like = f"{server.url}/tiny.npz", shapes_of(tiny_model("tanh"))
    first = pretrained.load(url, like)
    second = pretrained.load(url, like)
    assert server.asked == ["/tiny.npz"]
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_metadata_of_a_file_is_used_before_what_its_layout_suggests(tmp_path, capsys):
    params = pretrained.load(str(GOLDEN / "timm_tiny.safetensors"), shapes_of(tiny_model("erf")))
    assert (
        "the weights do not say how they were trained; assumed from their layout: model.gelu=erf"
        in capsys.readouterr().out
    )
    pixels = {"image_size_px": 32, "interpolation": "bilinear", "mean": [0.1], "std": [0.2]}
    origin = {"model": {"gelu": "tanh"}, "preprocess": pixels}
    write_safetensors(tmp_path / "w.safetensors", params, metadata=origin)
    assert pretrained.describe(str(tmp_path / "w.safetensors")) == origin
    pretrained.load(str(tmp_path / "w.safetensors"), shapes_of(tiny_model("tanh")))
    assert "does not say" not in capsys.readouterr().out


def test_the_head_is_kept_only_for_the_same_classes(tmp_path, capsys):
    params = pretrained.load(str(GOLDEN / "google_tiny.npz"), shapes_of(tiny_model("tanh")))
    names = [f"class {i}" for i in range(10)]
    file = tmp_path / "w.npz"
    write_npz(file, params, metadata={"class_names": names, "model": {}, "preprocess": {}})
    like = jax.tree.map(lambda p: np.full(p.shape, 7, np.float32), shapes_of(tiny_model("tanh")))
    same = pretrained.load(str(file), like, class_names=names)
    np.testing.assert_array_equal(same["head"]["kernel"], params["head"]["kernel"])
    other = pretrained.load(str(file), like, class_names=names[::-1])
    np.testing.assert_array_equal(other["head"]["kernel"], like["head"]["kernel"])
    assert "head" in capsys.readouterr().out
    kept = pretrained.load(str(file), like, class_names=names[::-1], head="keep")
    np.testing.assert_array_equal(kept["head"]["kernel"], params["head"]["kernel"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("imagenet21k/Mixer-B16", "did you mean imagenet21k/Mixer-B_16"),
        ("no/such/thing.npz", "not a published name, file, folder, run directory or URL; .* lists all names"),
        ("{folder}", "neither a run directory nor a folder of weights with a model.safetensors: give"),
        ("x" * 300, "not a published name, file"),
        ("~nobody-at-all/w.npz", "not a published name, file"),
    ],
)
def test_an_error_for_missing_weights_is_one_line(source, message, tmp_path):
    for use in (pretrained.describe, lambda source: pretrained.load(source, {"stem": {}})):
        with pytest.raises(UserError, match=message) as error:
            use(source.format(folder=tmp_path))
        assert "\n" not in str(error.value)


def test_the_result_of_init_with_all_its_collections_is_refused():
    with pytest.raises(UserError, match=r"under variables\['params'\]"):
        pretrained.load(str(GOLDEN / "google_tiny.npz"), {"params": shapes_of(tiny_model("tanh"))})


def test_arrays_that_are_not_part_of_a_mixer_are_reported(tmp_path):
    arrays = dict(np.load(GOLDEN / "google_tiny.npz"))
    np.savez(tmp_path / "w.npz", **arrays, **{"cls/token": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="cls: unexpected, not in the model"):
        pretrained.load(str(tmp_path / "w.npz"), shapes_of(tiny_model("tanh")))


@pytest.mark.slow
def test_the_program_prints_a_table_of_80_columns_and_downloads_weights(server, tmp_path):
    (server.folder / "tiny.npz").write_bytes((GOLDEN / "google_tiny.npz").read_bytes())
    environment = os.environ | {"MLPMIXER_CACHE": str(tmp_path / "cache")}

    def run(*arguments):
        command = [sys.executable, "-m", "mlpmixer_flax.pretrained", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = run()
    assert done.returncode == 0, done.stderr
    rows = done.stdout.split("\n\n")[0].splitlines()
    assert max(map(len, rows)) <= 80 and len(rows) == 1 + len(PUBLISHED)
    done = run(f"{server.url}/tiny.npz")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    done = run(f"{server.url}/absent.npz")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


LARGE = r"""
import re, sys, jax, numpy as np
from mlpmixer_flax import pretrained
from mlpmixer_flax.config import mixer_l16_config
from mlpmixer_flax.models import MlpMixer
model = MlpMixer(num_classes=21843, **mixer_l16_config)
like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
params = pretrained.load(sys.argv[1], like)
assert params["head"]["kernel"].shape == (1024, 21843)
print(1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_loading_large_weights_needs_little_more_memory_than_they_have(tmp_path):
    model = MlpMixer(num_classes=21843, **mixer_l16_config)
    zeros = jax.tree.map(lambda p: np.broadcast_to(np.float32(0.5), p.shape), shapes_of(model, 224))
    file = tmp_path / "Mixer-L_16.npz"
    write_npz(file, zeros, metadata={})
    size = file.stat().st_size
    assert size / 2**20 == pytest.approx(875.78, abs=0.1)
    done = subprocess.run([sys.executable, "-c", LARGE, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2.2 * size  # of the whole process, with JAX
