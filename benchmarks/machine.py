"""What a result depends on besides its config: devices, versions, the commit, and whether images are stored with loss."""

import os
import platform
import subprocess
from pathlib import Path

import flax
import jax
import tensorflow_datasets as tfds

from mlpmixer_flax import __version__
from mlpmixer_flax.data.tfds import load_builder


def hardware() -> str:
    """Returns the devices in words: "2 cores of AMD EPYC 7B13", "4 x NVIDIA H100"."""
    count, device = jax.device_count(), jax.devices()[0]
    if device.platform != "cpu":
        return f"{count} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return cores + (f", {count} devices" if count > 1 else "")


def versions() -> str:
    """Returns the versions of Python and of the packages that compute."""
    return (
        f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}, "
        f"mlpmixer-flax {__version__}"
    )


def commit() -> str:
    """Returns the commit of the code, and whether files differ from it: "1a2b3c4 with changes"; "" outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        diff = [*git, "diff", "--quiet", "HEAD", "--", ":/mlpmixer_flax", ":/configs"]
        changed = subprocess.run(diff, capture_output=True)
    except OSError:  # git is not installed
        return ""
    return "" if found.returncode else found.stdout.strip() + " with changes" * bool(changed.returncode)


def is_jpeg_copy(dataset: str, data_dir: str) -> bool:
    """Returns whether images that are officially without loss are stored as JPEG files here."""
    if dataset not in ("cifar10", "mnist"):
        return False
    source = load_builder(dataset, data_dir).as_data_source(
        "test", decoders={"image": tfds.decode.SkipDecoding()}
    )
    return source[0]["image"].startswith(b"\xff\xd8")
