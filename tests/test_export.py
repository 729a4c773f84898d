"""Exported files hold the weights bit by bit, and predict the same in other programs."""

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import chex
import jax
import jax.export
import numpy as np
import pytest
from elsewhere import predict_elsewhere
from PIL import ExifTags, Image, ImageOps
from safetensors.numpy import load_file

from mlpmixer_flax import UserError, pretrained
from mlpmixer_flax.checksums import write_checksums
from mlpmixer_flax.data.images import FITS, MODES, read_square
from mlpmixer_flax.export import __doc__ as help_text
from mlpmixer_flax.export import export, main
from mlpmixer_flax.inference.load import load, load_run
from mlpmixer_flax.inference.stablehlo import PLATFORMS
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.weights.files import open_weights


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory):
    """Returns a run that keeps an EMA and whose best checkpoint is not the last."""
    workdir = shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "run")
    metrics = workdir / "checkpoints" / "20" / "metrics" / "metrics"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"test/accuracy": 0.999}))
    write_checksums(metrics.parent.parent)
    return workdir


@pytest.mark.parametrize("format", ["npz", "safetensors"])
@pytest.mark.parametrize("checkpoint", [None, "last", "best", "ema"])
def test_exported_weights_are_loaded_bit_by_bit(run, tmp_path, format, checkpoint, capsys):
    file = tmp_path / "weights"
    chosen = [f"--checkpoint={checkpoint}"] if checkpoint else []
    assert main([f"--workdir={run}", f"--format={format}", f"--output={file}", *chosen]) == 0
    step, params = read_weights(run, checkpoint or "best")
    assert step == {None: 20, "last": 40, "best": 20, "ema": 40}[checkpoint]
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal(pretrained.load(str(file), like), params)
    out = capsys.readouterr().out
    assert f"step {step} of" in out
    assert ("--checkpoint=ema" in out) == (checkpoint == "last")
    assert ("GELUTanh" in out) == (format == "safetensors")


def test_the_three_kinds_of_weights_are_different(run):
    last, best, ema = (read_weights(run, which)[1]["stem"]["kernel"] for which in ("last", "best", "ema"))
    assert (last != ema).any() and (best != ema).any() and (best != last).any()


def test_the_layouts_are_those_of_google_and_timm(run, tmp_path):
    export(load_run(run), tmp_path / "w.npz", format="npz")
    export(load_run(run), tmp_path / "w.safetensors", format="safetensors")
    google, timm = np.load(tmp_path / "w.npz"), load_file(tmp_path / "w.safetensors")
    golden = Path(__file__).parent / "golden"
    blocks = ("_2/", ".2.")  # the golden model has one block more
    assert set(google.files) == {n for n in np.load(golden / "google_tiny.npz").files if blocks[0] not in n}
    assert set(timm) == {n for n in load_file(golden / "timm_tiny.safetensors") if blocks[1] not in n}
    np.testing.assert_array_equal(
        google["MixerBlock_1/token_mixing/Dense_0/kernel"].T, timm["blocks.1.mlp_tokens.fc1.weight"]
    )


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_a_file_has_metadata_about_its_training(run, tmp_path, format):
    file = tmp_path / "weights"
    export(load_run(run), file, format=format)
    metadata = open_weights(file).metadata
    assert metadata["num_classes"] == 10 and metadata["class_names"] == [str(i) for i in range(10)]
    assert metadata["model"]["gelu"] == "tanh" and metadata["model"]["hidden_dim"] == 16
    assert metadata["preprocess"]["image_size_px"] == 8
    assert metadata["preprocess"]["mean"] == metadata["preprocess"]["std"] == [0.5]
    assert metadata["step"] == 20  # the best


@pytest.mark.parametrize(("source", "target"), [("npz", "safetensors"), ("safetensors", "npz")])
def test_weights_of_a_file_are_converted_to_the_other_format_with_their_metadata(
    run, tmp_path, source, target
):
    first, second = tmp_path / "first", tmp_path / "second"
    export(load_run(run, "best"), first, format=source)
    assert main([f"--weights={first}", f"--format={target}", f"--output={second}"]) == 0
    before, after = load(str(first)), load(str(second))
    chex.assert_trees_all_equal(after.params, before.params)
    assert after.module == before.module
    assert (after.preprocess, after.class_names) == (before.preprocess, before.class_names)


@pytest.mark.parametrize("format", ["npz", "safetensors", "stablehlo", "onnx", "hub"])
def test_a_file_that_cannot_be_written_is_an_error(run, tmp_path, format):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file/folder .*: choose another place"):
        export(load_run(run), tmp_path / "file" / "folder" / "w", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_of_the_file_is_created_and_paths_are_text_or_path(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = load_run(run)
    for output in (
        "~/a/b/w.npz",
        Path("~/c/w.npz"),
        tmp_path / ("x" * 200),
        str(tmp_path / "new\n\udcff" / "-w"),
    ):
        (note,) = export(model, output, format="npz")
        file = Path(output).expanduser()
        assert str(file) in note and load(file).class_names == model.class_names
    assert main([f"--workdir={run}", "--format=npz", "--output=~/d/e/w.npz"]) == 0
    assert (tmp_path / "d" / "e" / "w.npz").exists()


@pytest.mark.parametrize("url", ["https://a.b/w.npz", "xyz://bucket/w.npz"])
def test_a_url_and_an_unknown_format_are_refused_before_anything_is_written(
    run, url, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^output '{url}' is a URL, and only local paths and"):
        export(load_run(run), url, format="npz")
    with pytest.raises(SystemExit):
        main([f"--workdir={run}", "--format=npz", f"--output={url}"])
    assert f"argument --output: '{url}' is a URL, and only local paths and" in capsys.readouterr().err
    with pytest.raises(UserError, match="format=.xyz. is unknown: choose one of npz, safetensors, "):
        export(load_run(run), "new/w.xyz", format="xyz")
    assert not list(tmp_path.iterdir())


def test_class_names_that_are_not_text_are_written_with_escapes(run, tmp_path):
    names = tuple(f"bad\udcff\n{number}" for number in range(10))
    model = dataclasses.replace(load_run(run), class_names=names)
    for format in ("npz", "safetensors"):
        export(model, tmp_path / format, format=format)
        assert load(tmp_path / format).class_names == names
    export(model, tmp_path / "m", format="stablehlo")
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))["class_names"] == list(names)


def test_an_error_is_one_line_and_nothing_is_written(run, tmp_path, capsys):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    output = ["--format=npz", f"--output={tmp_path}/w"]
    for arguments, message in (
        ([f"--workdir={tmp_path}"], "has no checkpoint: train first"),
        ([f"--weights={run}", "--checkpoint=best"], "--checkpoint=best is for --workdir only"),
        ([f"--weights={tmp_path}/w"], "no weights"),
        (
            [f"--workdir={run}", "--output=w.safetensors"],
            "--output=w.safetensors does not fit --format=npz: give --format=safetensors, or a name that ends in .npz",
        ),
    ):
        assert main([*output, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_the_program_fails_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "mlpmixer_flax.export", f"--workdir={tmp_path}", "--format=npz"]
    done = subprocess.run([*command, f"--output={tmp_path}/w.npz"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run in") and done.stderr.count("\n") == 1


# --- stablehlo

LOADER = textwrap.dedent(re.search(r"flatbuffers:\n\n(.*?)\n\n", help_text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def stablehlo(run, tmp_path_factory):
    """Returns the file that the program writes for the best weights of the run."""
    file = tmp_path_factory.mktemp("exported") / "b16.stablehlo"
    assert main([f"--workdir={run}", "--checkpoint=best", "--format=stablehlo", f"--output={file}"]) == 0
    return file


@pytest.mark.slow
def test_the_five_lines_of_the_help_predict_the_same_in_a_process_without_our_package(
    run, stablehlo, tmp_path
):
    assert len(LOADER.splitlines()) == 5
    given, found = predict_elsewhere(
        LOADER,
        tmp_path,
        cwd=stablehlo.parent,
        without="flax optax orbax ml_collections",
        kept="class_names",
    )
    model = load_run(run, "best")
    assert tuple(found["class_names"]) == model.class_names
    predict = jax.jit(partial(model.probabilities, model.params))
    for size, images in given.items():
        assert found[size].dtype == np.float32
        np.testing.assert_allclose(found[size], predict(images), atol=1e-6)
        np.testing.assert_allclose(found[size].sum(axis=1), 1, atol=1e-5)
    assert np.ptp(found["8"], axis=0).max() > 0.01  # the predictions differ between images


def test_a_stablehlo_file_works_for_any_number_of_images_on_every_platform(stablehlo):
    exported = jax.export.deserialize(bytearray(stablehlo.read_bytes()))
    assert exported.platforms == PLATFORMS == ("cpu", "cuda", "tpu")
    (images,), (probabilities,) = exported.in_avals, exported.out_avals
    assert (images.str_short(), probabilities.str_short()) == ("uint8[b,8,8,1]", "float32[b,10]")
    assert exported.nr_devices == 1
    with pytest.raises(ValueError, match="uint8"):
        exported.call(np.zeros((2, 8, 8, 1), np.float32))


def test_the_file_beside_stablehlo_says_how_to_prepare_a_photo(run, stablehlo, tmp_path):
    beside = json.loads(Path(f"{stablehlo}.json").read_text())
    config = load_run(run).config
    assert beside["preprocess"] == config["preprocess"] and beside["model"] == config["model"]
    assert beside["step"] == 20 and beside["num_classes"] == 10

    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (301, 400, 3)).astype(np.uint8))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "photo.jpg", exif=turned)
    opening, cropping, stacking = _lines_after('if "fit" is "crop":')
    squares = {"crop": [cropping]} | {
        fit: _lines_after(f'If "fit" is "{fit}", these replace the second line:')
        for fit in ("stretch", "pad")
    }
    assert squares.keys() == {*FITS}
    options = itertools.product(squares, ("bilinear", "bicubic"), (0.0625, 0.0), (1, 3))
    for fit, interpolation, bleed, channels in options:
        lines = "\n".join([opening, *squares[fit], stacking])
        for stated, value in {
            "BILINEAR": interpolation.upper(),
            "0.0625": bleed,
            "RGB": MODES[channels],
        }.items():
            assert stated in lines
            lines = lines.replace(stated, str(value))
        found = {"Image": Image, "ImageOps": ImageOps, "numpy": np}
        with contextlib.chdir(tmp_path):
            exec(lines, found)
        ours = read_square(
            tmp_path / "photo.jpg",
            channels=channels,
            size_px=224,
            crop_fraction=1 - 2 * bleed,
            interpolation=interpolation,
            fit=fit,
        )
        np.testing.assert_array_equal(found["images"].reshape(1, 224, 224, channels), ours[None])


def _lines_after(words):
    """Returns the lines of code of the help that come after these words."""
    lines = re.search(rf"{re.escape(words)}\n\n(.*?)\n\n", help_text, re.DOTALL)[1]
    return textwrap.dedent(lines).split("\n")


def test_an_image_is_cropped_once_and_a_sigmoid_head_gives_sigmoids(run, tmp_path):
    """The function takes images from `read_square`, which has cropped them already."""
    model = load_run(run)
    cropping = dataclasses.replace(
        model, loss="sigmoid", preprocess={**model.preprocess, "crop_fraction": 0.5}
    )
    export(cropping, tmp_path / "m", format="stablehlo")
    exported = jax.export.deserialize(bytearray((tmp_path / "m").read_bytes()))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    sigmoid = dataclasses.replace(model, loss="sigmoid")
    whole = jax.jit(partial(sigmoid.probabilities, model.params))
    np.testing.assert_allclose(exported.call(images), whole(images), atol=1e-6)
    assert json.loads((tmp_path / "m.json").read_text())["preprocess"]["crop_fraction"] == 0.5


def test_output_fits_80_columns(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert main([f"--workdir={run}", "--format=safetensors", "--output=w"]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if str(run) not in line]
    assert max(map(len, lines)) <= 80
