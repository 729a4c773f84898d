"""Fixtures of several files of tests, and one compilation cache for all processes of a test run."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from made_datasets import encode, write_dataset

# Set before anything imports JAX, and inherited by the processes that run tests and by those that tests start.
# On a GPU, none of these processes may take most of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Whatever one of them has compiled, the others read from here.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="mlpmixer-flax-compiled-"))
os.environ.setdefault("MLPMIXER_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"] + "/cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A script that starts the tests in the background makes them ignore Ctrl-C, and so would all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):  # the process that started the others
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """40 training and 9 test JPEGs of several sizes, two of them grayscale: a gradient across, one down."""
    rng = np.random.default_rng(0)

    def photo(i):
        width, height = int(rng.integers(20, 60)), int(rng.integers(20, 60))
        across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
        down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        pixels = np.stack([across, down, np.full((height, width), 6 * i)], -1).astype(np.uint8)
        return encode(pixels[..., 0] if i in (3, 4) else pixels, "JPEG", quality=95), i % 3

    examples = {"train": [photo(i) for i in range(40)], "test": [photo(i) for i in range(9)]}
    return write_dataset(tmp_path_factory.mktemp("photos"), "photos", examples)


@pytest.fixture(scope="session")
def s3_server():
    """The address of an S3 server on this machine; without moto and s3fs, its tests are skipped."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        s3fs.S3FileSystem.clear_instance_cache()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    """The address of an empty bucket, "s3://bucket-7"; with an empty cache, as on a new machine."""
    import fsspec

    names = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**names, "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{secrets.token_hex(4)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def quick_to_compile():
    """Turns off XLA's optimizations, for files of tests that spend nearly all of their time in compilation."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A directory of all processes that run tests, for what is made once; a FileLock lets one of them make it."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def digits_run(common):
    """The directory of a small run on the digits that keeps an EMA; trained once, so copy it before you change it."""
    from mlpmixer_flax import fit, load_config

    workdir = common / "digits_run"
    changes = {
        "model.hidden_dim": 16,
        "model.channels_mlp_dim": 16,
        "model.num_blocks": 2,
        "augment.mixup_alpha": 0.0,  # otherwise compiling takes seconds
        "ema_decay": 0.9,
        "optimizer.learning_rate": 0.01,
        "schedule.name": "constant",
        "total_steps": 40,
        "eval_every_steps": 20,
        "save_every_steps": 10,
        "keep_checkpoints": 4,
    }
    with FileLock(f"{workdir}.lock"):
        if not workdir.exists():
            fit(load_config("digits.py", changes), workdir)
    return workdir


@pytest.fixture
def quick_lock(monkeypatch):
    """Renews the lock of a remote run directory twice a second, so that tests need not wait long for its end."""
    from mlpmixer_flax.training import remote_lock

    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.5)


@pytest.fixture
def clock(monkeypatch):
    """Stops the time of reports; `clock.now += seconds` moves it on."""
    from mlpmixer_flax.training import report

    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server of a file for downloads, with an empty cache, and short pauses between tries."""
    from download_site import serve

    from mlpmixer_flax.weights import download

    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.01, 0.01, 0.01))
    with serve() as served:
        yield served
