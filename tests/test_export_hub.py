"""A folder for the hub is read back unchanged, and uploaded by the real client to a server in a process of its own."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax import UserError, evaluate, load
from mlpmixer_flax.export import export, main
from mlpmixer_flax.inference.card import model_card
from mlpmixer_flax.inference.hub_folder import _ratio, timm_config
from mlpmixer_flax.weights import source
from mlpmixer_flax.weights import timm_config as timm_reader
from mlpmixer_flax.weights.files import open_weights

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def folder(digits_run, tmp_path_factory):
    """Returns the folder that the program writes for a run on the digits."""
    folder = tmp_path_factory.mktemp("exported") / "digits"
    assert main([f"--workdir={digits_run}", "--format=hub", f"--output={folder}"]) == 0
    return folder


def test_the_folder_is_a_model_for_load_init_from_and_evaluate(folder, digits_run, tmp_path, capsys):
    assert sorted(os.listdir(folder)) == FILES
    ours, again = load(digits_run), load(folder)
    chex.assert_trees_all_equal(again.params, ours.params)
    assert again.module == ours.module.clone(patches={"size": (2, 2)})  # JSON has lists
    assert again.class_names == ours.class_names
    assert again.preprocess == ours.preprocess
    assert not [note for note in source.find(folder).notes if "contradicts" in note]
    like = {key: np.zeros_like(value) for key, value in ours.params["head"].items()}
    like = {**ours.params, "head": like}
    chex.assert_trees_all_equal(source.load(folder, like), ours.params)  # as init_from does
    arguments = [f"--weights={folder}", "--dataset=digits", "--split=test", f"--output={tmp_path}"]
    assert evaluate.main(arguments) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] == pytest.approx(ours.scores["test/accuracy"])


def test_config_json_alone_says_how_the_weights_were_trained(folder, digits_run):
    """As after timm has written the weights again, without our metadata."""
    model = load(digits_run)
    bare = dataclasses.replace(open_weights(folder / "model.safetensors"), metadata={})
    origin = timm_reader.read(folder / "config.json", bare)
    assert origin.notes == []
    assert origin.metadata["model"] == {"gelu": "tanh"}
    assert tuple(origin.metadata["class_names"]) == model.class_names
    stated = {key: value for key, value in model.preprocess.items() if key != "fit"}
    assert origin.metadata["preprocess"] == {**stated, "mean": (0.5,), "std": (0.5,)}


def test_the_config_has_timms_name_of_a_size_and_else_all_arguments(digits_run):
    small = load(digits_run)
    config = timm_config(small)
    assert config["architecture"] == "mlp_mixer"
    arguments = {"img_size", "in_chans", "mlp_ratio", "patch_size", "embed_dim", "num_blocks"}
    assert config["model_args"].keys() == arguments and config["model_args"]["in_chans"] == 1
    sizes = {"patches": {"size": (16, 16)}, "hidden_dim": 768, "num_blocks": 12, "gelu": "erf"}
    module = small.module.clone(**sizes, tokens_mlp_dim=384, channels_mlp_dim=3072)
    names = ("n01440764", *small.class_names[1:])
    b16 = timm_config(dataclasses.replace(small, module=module, class_names=names))
    assert b16["architecture"] == "mixer_b16_224" and b16["act_layer"] == "gelu"
    assert b16["model_args"] == {"img_size": 8, "in_chans": 1, "mlp_ratio": [0.5, 4.0]}
    assert b16["label_names"] == list(names) and "tench" in b16["label_descriptions"]["n01440764"]


def test_the_ratios_of_sizes_give_these_sizes_back():
    for of in (16, 49, 96, 768, 1000):
        assert [int(_ratio(dim, of) * of) for dim in range(1, 3 * of)] == list(range(1, 3 * of))


def test_the_card_tells_figures_data_and_use_and_its_code_runs(folder, digits_run, monkeypatch):
    card, model = (folder / "README.md").read_text(), load(digits_run)
    assert f"| test | accuracy | {100 * model.scores['test/accuracy']:.2f} % |" in card
    assert "Trained on `digits`, split `train`; evaluated on split `test`" in card
    assert "licence" in card.lower() and "# digits\n" in card and "gray images of 8x8 px" in card
    theirs, ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(theirs, "card", "exec")  # benchmarks/timm_hub.py runs it
    assert "timm.models.mlp_mixer.MlpMixer(" in theirs and "GELUTanh" in theirs
    monkeypatch.chdir(folder.parent)
    Image.new("L", (8, 8)).save("photo.jpg")
    exec(ours, {})


def test_the_card_has_no_private_path_no_html_and_no_scores_of_other_weights(digits_run):
    model = load(digits_run)
    config = {**model.config, "dataset": "folder:/home/ann/secret/photos/", "init_from": "/home/ann/b16.npz"}
    names = ("<script>`x", *model.class_names[1:])
    changed = dataclasses.replace(model, config=config, class_names=names, scores={}, loss="sigmoid")
    card = model_card(changed, timm_config(changed), name="ann/photos")
    assert "ann/secret" not in card and "folder of images, photos`" in card and "the weights b16.npz" in card
    assert "<script>" not in card and "add those that you measured" in card and "sigmoid makes" in card
    assert "snapshot_download('ann/photos')" in card and "mf.load('hf-hub:ann/photos')" in card
    assert load(digits_run, checkpoint="last").scores == {}  # its scores are those of the EMA
    assert load(digits_run, checkpoint="ema").scores["test/accuracy"] > 0.5


def test_the_card_of_a_run_with_a_table_and_several_labels(digits_run):
    model = load(digits_run)
    config = {**model.config, "dataset": "table:/home/ann/secret/scenes.csv"}
    scores = {"validation/accuracy": 0.5, "validation/mean_average_precision": 0.75, "validation/loss": 1.25}
    changed = dataclasses.replace(model, config=config, scores=scores, loss="sigmoid", multi_label=True)
    card = model_card(changed, timm_config(changed), name="ann/scenes")
    assert "secret" not in card and "Trained on `a table of labels, scenes.csv`, split" in card
    assert "| validation | mean average precision | 75.00 % |" in card
    assert "| validation | all labels right | 50.00 % |" in card and "| validation | loss | 1.25 |" in card
    assert "central crop" not in card  # which would keep everything


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, False),
        ({"crop_fraction": 0.875}, True),
        ({"mean": (0.0,)}, True),
        ({"fit": "crop", "mean": (0.0,)}, False),
    ],
)
def test_padding_that_is_another_in_timm_is_said(digits_run, tmp_path, changes, differs):
    model = load(digits_run)
    preprocess = model.preprocess | {"fit": "pad", "crop_fraction": 1.0, "mean": (0.5,)} | changes
    notes = export(dataclasses.replace(model, preprocess=preprocess), tmp_path / "padded", format="hub")
    assert any("timm pads with the mean, not with gray" in note for note in notes) == differs


def test_a_card_that_exists_is_kept_and_the_rest_is_replaced(folder, digits_run, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("license: mit")
    (copy / "config.json").write_text("{}")
    notes = export(load(digits_run), copy, format="hub")
    assert (copy / "README.md").read_text() == "license: mit"
    assert any("README.md exists and is kept" in note for note in notes)
    assert json.loads((copy / "config.json").read_text())["num_classes"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format=npz", "--push=someone/mixer"], "is for --format=hub only"),
        (["--format=hub", "--push=mixer"], "'mixer' is not the name of a model"),
        (["--format=hub", "--push=a/b/c"], "'a/b/c' is not the name of a model"),
    ],
)
def test_a_wrong_push_is_refused_before_anything_is_written(digits_run, tmp_path, options, message, capsys):
    assert main([f"--workdir={digits_run}", f"--output={tmp_path}/out", *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_directory_is_not_overwritten(digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="is a run directory, whose config.json would be replaced"):
        export(load(run), run, format="hub")
    assert (run / "config.json").read_bytes() == before and not (run / "README.md").exists()


# --- upload


@pytest.fixture
def hub(tmp_path):
    """Returns (folder with the models of a server, environment in which it is the hub)."""
    pytest.importorskip("huggingface_hub")
    models = tmp_path / "models"
    models.mkdir()
    command = [sys.executable, Path(__file__).parent / "hub_server.py", models]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        environment = os.environ | {
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "may-write",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        yield models, environment
        server.terminate()


def run_program(environment, program, *arguments):
    command = [sys.executable, "-m", f"mlpmixer_flax.{program}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_a_pushed_model_is_on_the_hub_and_its_card_there_is_kept(hub, folder, digits_run, tmp_path):
    models, environment = hub
    push = [f"--weights={folder}", "--format=hub", f"--output={tmp_path}/out", "--push=someone/mixer"]
    done = run_program(environment, "export", *push)
    assert done.returncode == 0, done.stderr
    assert "hf-hub:someone/mixer" in done.stdout
    uploaded = models / "someone" / "mixer"
    assert sorted(os.listdir(uploaded)) == FILES
    for file in FILES:
        assert (uploaded / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert "hf-hub:someone/mixer" in (uploaded / "README.md").read_text()

    (uploaded / "README.md").write_text("license: mit")
    done = run_program(environment, "export", *push)
    assert done.returncode == 0 and "README.md on the hub is kept" in done.stdout
    assert (uploaded / "README.md").read_text() == "license: mit"
    assert (models / "requests.txt").read_text().count("/api/repos/create") == 2

    run = shutil.copytree(digits_run, tmp_path / "run")  # may not be overwritten, so no new model is made
    wrong = [f"--workdir={run}", "--format=hub", f"--output={run}", "--push=someone/other"]
    done = run_program(environment, "export", *wrong)
    assert done.returncode == 2 and "is a run directory" in done.stderr
    assert os.listdir(models / "someone") == ["mixer"]

    done = run_program(environment, "predict", "--weights=hf-hub:someone/mixer", photo(tmp_path))
    assert done.returncode == 0 and "photo.png" in done.stdout, done.stderr


def photo(place):
    Image.new("L", (8, 8)).save(place / "photo.png")
    return str(place / "photo.png")


@pytest.mark.slow
def test_an_upload_that_the_hub_refuses_is_one_sentence_and_nothing_is_written(hub, folder, tmp_path):
    _, environment = hub
    for token, owner in (("may-read", "someone"), ("may-write", "nobody")):
        push = ["--format=hub", f"--output={tmp_path}/out", f"--push={owner}/mixer"]
        done = run_program(environment | {"HF_TOKEN": token}, "export", f"--weights={folder}", *push)
        (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"does not take {owner}/mixer" in message and "run hf auth login" in message
        assert not (tmp_path / "out").exists()
