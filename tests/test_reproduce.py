"""Tests the table of published figures and the program that runs it, with stand-ins for data and weights."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from made_datasets import encode

from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.download import cache_file
from mlpmixer_flax.weights.files import write_safetensors

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODULES = ("figures", "machine", "reproduction_page", "reproduce")
TINY = ["--config.model.hidden_dim=8", "--config.model.tokens_mlp_dim=6", "--config.model.channels_mlp_dim=8"]
TWO_UPDATES = [
    "--config.model.num_blocks=2",
    "--config.batch_size=4",
    "--config.total_steps=2",
    "--config.schedule.warmup_steps=1",
]
# for the folder of `write_photos`
ON_PHOTOS = [*TINY, *TWO_UPDATES, "--config.dataset=folder:photos", "--config.test_split=validation"]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The module of a copy of the program, with an empty cache of weights and an empty TFDS directory."""
    copy = tmp_path / "benchmarks"
    copy.mkdir()
    (tmp_path / "docs").mkdir()
    for name in MODULES:
        shutil.copy(BENCHMARKS / f"{name}.py", copy)
    with (copy / "figures.py").open("a") as file:  # a row that can run anywhere
        file.write(
            'ROWS["digits"] = Row("digits", "nowhere", 50.0, "1 epoch", first=40.0, config="digits.py", changes='
            '{"total_epochs": 2.0, "model.num_blocks": 1, "augment.mixup_alpha": 0.0, "eval_every_epochs": 1.0, '
            '"log_every_steps": 5})\n'
        )
    monkeypatch.syspath_prepend(str(copy))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("reproduce")


def stand_in(name, *, num_blocks, favorite=None):
    """Puts a small file of published weights, with their layout and all of their classes, where a download would.

    The stand-in has random weights; with `favorite`, it always predicts this class.
    """
    published = PUBLISHED[name]
    patches = {"size": published.origin["model"]["patches"]["size"]}
    sizes = {"hidden_dim": 8, "num_blocks": num_blocks, "tokens_mlp_dim": 6, "channels_mlp_dim": 8}
    model = MlpMixer(num_classes=published.num_classes, patches=patches, **sizes)
    images = np.zeros((1, 224, 224, 3), np.float32)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    rng = np.random.default_rng(0)
    params = {key: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for key, leaf in shapes.items()}
    if favorite is not None:
        params["head", "bias"][favorite] = 1e3
    if name.startswith("hf-hub:"):
        from huggingface_hub.constants import HF_HUB_CACHE

        owner_name = published.url.removeprefix("hf-hub:")
        folder = Path(HF_HUB_CACHE) / f"models--{owner_name.replace('/', '--')}"
        file = folder / "snapshots" / "a" / "model.safetensors"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("a")
        write = partial(write_safetensors, metadata={})
    else:
        file, write = (
            cache_file(published.url),
            lambda file, tree: np.savez(file, **flatten_dict(tree, sep="/")),
        )
    file.parent.mkdir(parents=True)
    write(file, unflatten_dict(params))


def write_photos(folder, classes, *, count=4):
    """Writes train/ and val/ in ImageNet's layout: a folder per class, JPEG files of several sizes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, factor in classes.items():
            for number in range(count * factor):
                pixels = rng.integers(0, 256, (rng.integers(30, 60), 40, 3)).astype(np.uint8)
                file = folder / split / name / f"{split}_{number}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(encode(pixels, "JPEG"))


# --- the table


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mnist", 213_626),
        ("nano_cifar10", 671_882),
        ("omihub777_nano", 671_882),
        ("omihub777", 1_132_170),
        ("model_zoo", 6_782_858 + 1_024),
        ("cifar10", 6_533_642),
        ("mdmlp", 298_602),
        ("mdmlp_mixer", 17_110_026),
        ("paper_b16", 59_880_472),
        ("paper_l16", 208_196_168),
    ],
)
def test_a_row_has_as_many_parameters_as_it_says(program, name, count):
    row = program.ROWS[name]
    config = load_config(row.config, row.changes)
    classes, channels = (1000 if "paper" in name else 10), (1 if name == "mnist" else 3)
    sizes = {**config.model.to_dict(), "gelu": "tanh", "num_blocks": 2}
    px = config.preprocess.image_size_px

    def counted(blocks):
        model = MlpMixer(num_classes=classes, **{**sizes, "num_blocks": blocks})
        images = np.zeros((1, px, px, channels), np.float32)
        return sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), images))
        )

    # Tracing all blocks of Mixer-L takes seconds.
    assert counted(1) + (config.model.num_blocks - 1) * (counted(2) - counted(1)) == count
    if name in ("omihub777_nano", "omihub777", "model_zoo", "cifar10", "mdmlp"):
        assert f"{count:,}" in row.remarks


def test_each_row_names_a_config_or_weights_and_says_where_its_figure_is_from(program):
    for name, row in program.ROWS.items():
        assert bool(row.config) != bool(row.weights), name
        assert row.weights or load_config(row.config, row.changes), name
        assert "https://" in row.source or "did not find its address" in row.source or name == "digits", name
        assert len(name) <= 20 and row.accuracy > 50 - (name == "digits"), name


def test_the_page_is_as_the_program_writes_it(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    page = importlib.import_module("reproduction_page")
    assert page.PAGE.read_text() == page.page(page.read_measured()), (
        "run python benchmarks/reproduction_page.py"
    )


# --- the program


def test_without_a_row_the_table_says_what_is_missing_and_nothing_is_run(program, tmp_path, capsys):
    stand_in("sam/Mixer-B_32", num_blocks=1)
    assert program.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    missing = {line[:20].strip(): line[54:].strip() for line in lines[1:-3]}
    assert missing["digits"] == "-" and missing["mnist"] == "mnist" and missing["sam_b32"] == "imagenet2012"
    gpu = ", GPU" * (jax.default_backend() == "cpu")
    assert missing["vt_b16_imagenet21k"] == "cifar10, weights" + gpu
    assert not (tmp_path / "runs").exists() and not (tmp_path / "docs" / "reproduction.md").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no row 'nothing'"),
        (["mnist", "--device=3"], "unrecognized argument: --device=3"),
        (["digits", "--seeds=0"], "at least 1"),
        (["sam_b16", "--config.seed=3"], "leave out --config.seed=3"),
        (["mnist"], "mnist"),  # the dataset is not prepared
        (["digits", "mnist"], "mnist"),  # before anything runs
        (["digits", "--config.total_stepz=3"], "total_stepz"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(program, arguments, said, tmp_path, capsys):
    try:
        assert program.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_fits_80_columns_and_its_examples_are_parsed(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        program.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    head = sys.modules["reproduction_page"].HEAD  # the top of the page has examples, too
    shown = text.partition("examples:\n")[2] + head.partition("```")[2].partition("```")[0]
    examples = [line.split()[2:] for line in shown.splitlines() if "python benchmarks/reproduce.py" in line]
    assert len(examples) == 6 and sum(bool(program.parse(words).rows) for words in examples) == 5


def test_a_result_takes_the_place_of_an_earlier_one_and_the_page_shows_mean_and_spread(program, tmp_path):
    for seed, accuracy in [(1, 60.0), (0, 10.0), (0, 50.0), (2, 55.0)]:
        about = {
            "first": 0.0,
            "minutes": 3.2,
            "hardware": "a machine",
            "versions": "a version",
            "date": "today",
        }
        program.record({"row": "cifar10", "seed": seed, "accuracy": accuracy, "data": "JPEG copy", **about})
    lines = (tmp_path / "docs" / "reproduction.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| `cifar10`"))
    assert "| 90.1 | 55.00 ± 5.00 (n = 3) | cifar10, a GPU |" in line
    assert [line.partition(", ")[0] for line in lines if line.startswith("- Seed")] == [
        f"- Seed {seed}: {accuracy}.00 % on a JPEG copy" for seed, accuracy in enumerate((50, 60, 55))
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_result_is_what_the_run_measured_at_its_end(program, tmp_path, capsys):
    assert program.main(["all"]) == 0  # all that can run here is the digits
    (result,) = program.read_measured()
    metrics = (tmp_path / "runs" / "reproduce" / "digits-seed0" / "metrics.jsonl").read_text()
    scores = [
        row["test/accuracy"] for line in metrics.splitlines() if "test/accuracy" in (row := json.loads(line))
    ]
    assert len(scores) > 1 and (result["row"], result["seed"]) == ("digits", 0)
    assert (result["first"], result["accuracy"]) == (
        pytest.approx(100 * scores[0]),
        pytest.approx(100 * scores[-1]),
    )
    assert 0 < result["minutes"] < 5 and "jax" in result["versions"] and not result["data"]
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    assert f"| 50 (40 after one epoch) | {result['accuracy']:.2f} (n = 1) | digits |" in page
    capsys.readouterr()
    assert program.main(["digits"]) == 0  # a finished run is not run again
    assert "first update" not in capsys.readouterr().out
    assert (tmp_path / "docs" / "reproduction.md").read_text() == page


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_an_interrupted_row_continues_with_the_same_command(program, tmp_path, capsys):
    longer = "--config.total_steps=4000"
    command = [sys.executable, str(tmp_path / "benchmarks" / "reproduce.py"), "digits", longer]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        next(line for line in process.stdout if line.startswith("step 5/"))
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM: saved step" in rest
    assert not (tmp_path / "benchmarks" / "measured.jsonl").exists()
    step = int(rest.partition("saved step ")[2].partition(";")[0])
    assert program.main(["digits", longer.replace("4000", f"{step + 5}")]) == 0
    said = capsys.readouterr().out
    assert f"continuing from step {step} " in said and "(published: 50%)" in said
    assert not (tmp_path / "benchmarks" / "measured.jsonl").exists()  # of another length than the row


# --- what needs weights or data that are not here, with stand-ins

FINE_TUNED = [
    pytest.param(
        f"vt_{size}_{data}", marks=[] if (size, data) == ("b16", "imagenet21k") else pytest.mark.long
    )
    for size in ("b16", "l16")
    for data in ("imagenet1k", "imagenet21k")
]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("name", FINE_TUNED)
def test_a_row_is_fine_tuned_from_published_weights_to_a_score(program, name, tmp_path, capsys):
    weights = program.ROWS[name].changes["init_from"]
    stand_in(weights, num_blocks=2)
    write_photos(tmp_path / "photos", {"cat": 1, "dog": 1})
    assert program.main([name, *ON_PHOTOS]) == 0
    said = capsys.readouterr().out
    classes = PUBLISHED[weights].num_classes
    assert f"{weights}: " in said and f"{classes}" in said.replace(",", "")  # the note about the new head
    assert f"(published: {program.ROWS[name].accuracy:g}%)" in said
    assert not (tmp_path / "benchmarks" / "measured.jsonl").exists()  # a trial
    assert program.main([name, *ON_PHOTOS]) == 0
    assert "first update" not in capsys.readouterr().out


FROM_SCRATCH = [
    "nano_cifar10",
    "omihub777_nano",
    "omihub777",
    "model_zoo",
    "cifar10",
    "kentaroy47",
    "mdmlp_mixer",
    "mdmlp",
]


@pytest.mark.long
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_row_of_cifar10_is_trained_on_a_folder_of_images(program, name, tmp_path, capsys):
    write_photos(tmp_path / "photos", {"cat": 1, "dog": 1})
    assert program.main([name, *ON_PHOTOS]) == 0
    assert f"(published: {program.ROWS[name].accuracy:g}%)" in capsys.readouterr().out


PAPER = ["paper_b16", "paper_l16", "paper_b16_21k", "paper_l16_21k", "paper_l16_21k_448"]


@pytest.mark.long
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("name", PAPER)
def test_a_row_of_imagenet_is_trained_on_a_folder_in_its_layout(program, name, tmp_path, capsys):
    write_photos(tmp_path / "imagenet", {"n01440764": 1, "n01443537": 1})
    weights = program.ROWS[name].changes.get("init_from") or load_config(program.ROWS[name].config).init_from
    if weights:
        stand_in(weights, num_blocks=2)
    tiny = [
        *(word for word in TINY if "tokens" not in word or not name.endswith("448")),
        *(["--config.model.tokens_mlp_dim=24"] if name.endswith("448") else []),
        *TWO_UPDATES,
        "--config.num_workers=0",
    ]
    assert program.main([name, "--imagenet=folder:imagenet", *tiny]) == 0
    said = capsys.readouterr().out
    assert ("exact" in said) == name.endswith("448")
    assert f"(published: {program.ROWS[name].accuracy:g}%)" in said


EVALUATED = [
    "imagenet1k_b16",
    "imagenet1k_l16",
    "sam_b16",
    "sam_b32",
    "gsam_b16",
    "gsam_b32",
    "gsam_s8",
    "gsam_s16",
]
EVALUATED += ["gsam_s32", "timm_miil_b16", "timm_goog_b16", "timm_goog_l16"]
QUICK = ("imagenet1k_b16", "timm_miil_b16")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in EVALUATED]
)
def test_published_weights_are_scored_on_imagenet(program, name, tmp_path, monkeypatch, capsys):
    """Three quarters of the images are of the only class that the stand-in predicts."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write_photos(tmp_path / "imagenet", {"n01440764": 3, "n01443537": 1}, count=2)
    stand_in(program.ROWS[name].weights, num_blocks=1, favorite=0)
    assert program.main([name, "--imagenet=folder:imagenet"]) == 0
    (result,) = program.read_measured()
    assert (result["row"], result["accuracy"]) == (name, 75.0)
    line = next(
        line
        for line in (tmp_path / "docs" / "reproduction.md").read_text().splitlines()
        if f"`{name}`" in line
    )
    assert "| 75.00 (n = 1) | imagenet2012, `" in line
    capsys.readouterr()
    assert program.main([name, "--imagenet=folder:imagenet"]) == 0
    assert "top-1" not in capsys.readouterr().out  # it is not evaluated again


def test_all_rows_that_were_not_measured_yet_are_tested(program):
    fine_tuned = [name for case in FINE_TUNED for name in case.values]
    assert EVALUATED == [name for name, row in program.ROWS.items() if row.weights]
    measured = {"mnist", "class_project", "digits"}  # digits is the row of these tests
    assert {*program.ROWS} == {*FROM_SCRATCH, *fine_tuned, *PAPER, *EVALUATED, *measured}
