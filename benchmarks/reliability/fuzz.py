"""Damages files of every kind that a program reads, and checks that each is read or refused with a sentence.

    pip install hypothesis
    python benchmarks/reliability/fuzz.py                          # 100,000 inputs of each kind, an hour
    python benchmarks/reliability/fuzz.py --count=1000 npz images

A reader may return, or refuse the input with an error, as programs print it. Anything else is a fault, and so are a
control character in what is printed, more than 3,000 characters, and more than 10 seconds. Faulty inputs are written to
the folder of --faults, and the exit status is 1. Results: docs/reliability.md
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow
import xxhash
from damage import damage
from PIL import Image
from printed import controls_terminal
from pyarrow import parquet

from mlpmixer_flax import UserError
from mlpmixer_flax.checksums import check_files, write_checksums
from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.images import open_image
from mlpmixer_flax.data.listing import select_split
from mlpmixer_flax.data.splits import read_split
from mlpmixer_flax.data.tables import read_table
from mlpmixer_flax.ending import exit_status
from mlpmixer_flax.inference.load import load
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import default_checkpoint, describe_weights
from mlpmixer_flax.rundir import read_class_names, read_config_of_run
from mlpmixer_flax.training.continuing import check_class_names, compare_configs, usable_workdir
from mlpmixer_flax.training.record import check_data, read_record
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.training.unlogged import Unlogged
from mlpmixer_flax.training.validate import complete
from mlpmixer_flax.weights.files import write_npz, write_safetensors
from mlpmixer_flax.weights.source import find

CONFIG = resolve(get_config(), {}).to_dict()
SIZES = {
    "patches": {"size": (2, 2)},
    "hidden_dim": 4,
    "num_blocks": 1,
    "tokens_mlp_dim": 3,
    "channels_mlp_dim": 5,
}
DATA = {"dataset": "folder", "train": {"examples": 2, "hash": "ab", "files": {"a/0.png": 5, "b/0.png": 7}}}
DATA["test"] = DATA["train"]
TIMM_CONFIG = {
    "architecture": "mixer_b16_224",
    "num_classes": 3,
    "model_args": {"act_layer": "gelu_tanh", "img_size": 4, "patch_size": 2},
    "label_names": ["a", "b", "c"],
    "pretrained_cfg": {
        "input_size": [3, 4, 4],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "tag": "in1k",
    },
}
METRICS = [
    {"step": 5, "train/loss": 2.3, "images_per_second": 40.0},
    {"step": 6, "test/accuracy": 0.5, "test/loss": 2},
]


def params() -> dict:
    model = MlpMixer(num_classes=3, **SIZES)
    return jax.tree.map(
        np.asarray, model.init(jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))["params"]
    )


# --- undamaged files, as lists of bytes


def weight_files(write: Callable, end: str) -> list[bytes]:
    metadata = {
        "model": {**SIZES, "gelu": "erf"},
        "preprocess": {"image_size_px": 4},
        "class_names": ["a", "b", "c"],
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, known in enumerate(({}, metadata)):
            write(Path(folder, f"{number}{end}"), params(), metadata=known)
        return [file.read_bytes() for file in sorted(Path(folder).iterdir())]


def image_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    images = {kind: Image.fromarray(pixels) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")}
    files = []
    for kind, image in images.items():
        exif = Image.Exif()
        exif[0x0112] = 6
        with io.BytesIO() as file:
            image.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
            files.append(file.getvalue())
    wide = Image.fromarray(np.arange(72, dtype=np.uint16).reshape(8, 9) * 50)
    for kind in ("PNG", "TIFF"):
        with io.BytesIO() as file:
            wide.save(file, kind)
            files.append(file.getvalue())
    return files


def as_json(*contents: object) -> list[bytes]:
    return [json.dumps(content).encode() for content in contents]


# --- readers: each gets the folder to use and the damaged content of one file


def read_weights(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        weights = find(folder / name)
        for key in weights.shapes:
            weights.read(key)
        if zlib.crc32(data) % 500 == 0:  # it takes far longer than all the rest
            load(folder / name)

    return read


def read_run_config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    config = read_config_of_run(folder)
    complete(config, name="config.json")
    compare_configs(folder, config, CONFIG)


def read_names(folder: Path, data: bytes) -> None:
    (folder / "class_names.json").write_bytes(data)
    read_class_names(folder)
    check_class_names(folder, ["a", "b"])


def read_metric_rows(folder: Path, data: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    for row in read_metrics(folder / "metrics.jsonl"):
        assert isinstance(row["step"], int)


def read_scores(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(json.dumps(CONFIG).encode())
    scores = folder / "checkpoints" / "5" / "metrics"
    scores.mkdir(parents=True)
    (scores / "metrics").write_bytes(data)
    describe_weights(folder, default_checkpoint(folder), step=5)


def read_data_record(folder: Path, data: bytes) -> None:
    (folder / "data.json").write_bytes(data)
    check_data(folder, read_record(folder), DATA)


def read_unlogged(folder: Path, data: bytes) -> None:
    (folder / "unlogged.json").write_bytes(data)
    for row in Unlogged(folder).read(5):
        assert all(isinstance(value, float) for value in row.values())


def read_checksums(folder: Path, data: bytes) -> None:
    (folder / "default").mkdir()
    (folder / "default" / "a").write_bytes(b"a")
    write_checksums(folder)
    (folder / "xxh3_128.json").write_bytes(data)
    with contextlib.suppress(ValueError):  # both of its callers take it for a damaged checkpoint
        check_files(folder, "default")


def read_hub_model(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(SAFETENSORS)
    (folder / "config.json").write_bytes(data)
    find(folder)


def read_image(folder: Path, data: bytes) -> None:
    (folder / "image").write_bytes(data)
    open_image(str(folder / "image"), ("L", "RGB", "RGBA")[zlib.crc32(data) % 3])


def read_folder_names(folder: Path, data: bytes) -> None:
    for line in data.split(b"\n")[:6]:
        parts = [
            part[:200] for part in line.replace(b"\0", b"0").split(b"/") if part not in (b"", b".", b"..")
        ]
        with contextlib.suppress(OSError):  # a file lies where a folder should be
            file = os.path.join(os.fsencode(folder), *parts)
            os.makedirs(os.path.dirname(file), exist_ok=True)
            Path(os.fsdecode(file)).touch()
    select_split(read_folder(str(folder)), "train")


def read_labels(name: str) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        select_split(read_table(folder / name), "train")

    return read


def parquet_table() -> bytes:
    columns = {"file": [f"{i}.png" for i in range(9)], "labels": [["a", "b"], None, ["b"]] * 3}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def read_split_name(folder: Path, data: bytes) -> None:
    counts = {name: SimpleNamespace(num_examples=number) for name, number in (("train", 100), ("test", 10))}
    try:
        read_split(data.decode("utf-8", "surrogateescape"), counts)
    except ValueError as error:  # its callers put the reason into their message
        if isinstance(error, UserError) or len(str(error).splitlines()) > 1:
            raise


def read_path(folder: Path, data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    if "://" in text or text.startswith("hf"):
        return  # it would wait for a network
    usable_workdir(text)
    find(text)


SAFETENSORS = weight_files(write_safetensors, ".safetensors")[1]
READERS: dict[str, tuple[list[bytes], Callable[[Path, bytes], None]]] = {
    "npz": (weight_files(write_npz, ".npz"), read_weights("a.npz")),
    "safetensors": (weight_files(write_safetensors, ".safetensors"), read_weights("a.safetensors")),
    "config.json of a run": (as_json(CONFIG), read_run_config),
    "class_names.json": (as_json(["a", "b"]), read_names),
    "metrics.jsonl": ([b"\n".join(as_json(*METRICS)) + b"\n"], read_metric_rows),
    "scores of a checkpoint": (as_json(METRICS[1]), read_scores),
    "data.json": (as_json(DATA), read_data_record),
    "unlogged.json": (as_json({"5": [{"loss": 2.5}]}), read_unlogged),
    "xxh3_128.json": (as_json({"default/a": xxhash.xxh3_128_hexdigest(b"a")}), read_checksums),
    "config.json of timm": (as_json(TIMM_CONFIG), read_hub_model),
    "images": (image_files(), read_image),
    "names in a folder": (
        [b"train/cat/0.png\ntrain/dog/1.png\ntest/cat/2.png", b"a/0.png\nb/1.png"],
        read_folder_names,
    ),
    "CSV table": (
        [b'file,label,split\na/1.png,cat,train\n"b, 2.png",dog,val\n', b"file,labels\n1.png,a|b\n2.png,\n"],
        read_labels("labels.csv"),
    ),
    "Parquet table": ([parquet_table()], read_labels("labels.parquet")),
    "split": ([b"train[:50%]+test[5:]", b"train[10%:20%]", b"even"], read_split_name),
    "path": (
        [b"runs/b16@best", b"~/x", b"~nobody/x", b"gs:x", b"a" * 5000, b"imagenet21k/Mixer-B_16"],
        read_path,
    ),
}

# --- the run


def try_one(read: Callable[[Path, bytes], None], data: bytes) -> tuple[str, float]:
    """Returns what is wrong with how a reader takes an input, "" if nothing is; and the seconds it took."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    said, fault, started = io.StringIO(), "", time.monotonic()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if (status := exit_status(lambda: read(folder, data))) not in (0, 2):
                fault = f"status {status}"
    except Exception:
        fault = traceback.format_exc()
    seconds, text = time.monotonic() - started, said.getvalue()
    shutil.rmtree(folder, ignore_errors=True)
    problems = {
        f"control characters in {text[:300]!r}": controls_terminal(text),
        f"a text of {len(text):,} characters": len(text) > 3000,
        f"{seconds:.1f} seconds": seconds > 10,
    }
    return fault or next((problem for problem, found in problems.items() if found), ""), seconds


def fuzz(name: str, count: int, first_seed: int, faults: Path) -> bool:
    """Tries inputs of one kind; prints a line of the table, and returns whether there was no fault."""
    originals, read = READERS[name]
    for original in originals[:3]:
        if (fault := try_one(read, original)[0]) and name != "path":
            raise SystemExit(f"{name} refuses an undamaged file: {fault}")
    found, slowest, started = {}, 0.0, time.monotonic()
    for number in range(count):
        data = damage(originals, Random(f"{first_seed} {name} {number}"))
        fault, seconds = try_one(read, data)
        if fault.endswith("seconds"):  # once more, because another program may have kept the processor
            fault, seconds = try_one(read, data)
        slowest = max(slowest, seconds)
        if fault:
            found.setdefault(fault.splitlines()[-1][:160], (data, fault))
    for number, (data, fault) in enumerate(found.values()):
        faults.mkdir(parents=True, exist_ok=True)
        file = faults / f"{name.replace(' ', '_')}-{number}"
        file.write_bytes(data)
        print(f"{fault}\nthe input is in {file}\n", file=sys.stderr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| {name} | {count:,} | {len(found)} | {slowest:.2f} s | {peak:,.0f} MB | {time.monotonic() - started:.0f} s |",
        flush=True,
    )
    return not found


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each kind (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other inputs (default: 0)")
    parser.add_argument(
        "--faults", type=Path, default=Path("faults"), help="folder for faulty inputs (default: faults)"
    )
    options = parser.parse_args()
    if unknown := [kind for kind in options.kinds if kind not in READERS]:
        parser.error(f"unknown kind {unknown[0]!r}: choose from {', '.join(READERS)}")
    print(
        "| kind | inputs | kinds of fault | slowest | peak memory of the process | time |\n|---|---|---|---|---|---|"
    )
    passed = [fuzz(kind, options.count, options.seed, options.faults) for kind in options.kinds or READERS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
