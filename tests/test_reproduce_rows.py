"""Runs each row of the published figures that was not measured yet on a small scale, with stand-ins for weights and data."""

import sys

import pytest
from copied_reproduce import copied_program, stand_in, write_photos

from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED

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
    return copied_program(tmp_path, monkeypatch)


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
    monkeypatch.setitem(sys.modules["reproduction_task"].IMAGENET, "validation", 8)
    monkeypatch.setattr(sys.modules["reproduction_task"], "IMAGENET_CLASSES", 2)
    stand_in(program.ROWS[name].weights, num_blocks=1, favorite=0)
    assert program.main([name, "--imagenet=folder:imagenet", "--seeds=3"]) == 0
    (result,) = program.read_measured()  # one for all seeds
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

    write_photos(tmp_path / "other", {"n01440764": 1, "n01443537": 1})
    assert program.main([name, "--imagenet=folder:other"]) == 0
    said = capsys.readouterr().out
    assert "top-1" in said and f"{name}, seed 0: 50.00% (published" in said


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_other_images_than_those_of_imagenet_are_a_trial(program, tmp_path, capsys):
    stand_in("sam/Mixer-B_32", num_blocks=1, favorite=0)
    for folder, share in (("three", 3), ("one", 1)):
        write_photos(tmp_path / folder, {"n01440764": share, "n01443537": 1}, count=2)
        assert program.main(["sam_b32", f"--imagenet=folder:{folder}"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert (
            f"a trial, so its result is not recorded: the validation split of folder:{folder} has {2 * share + 2} images "
            "of 2 classes, not 50,000 of 1,000 "
        ) in said
        assert f"sam_b32, seed 0: {100 * share / (share + 1):.2f}% (published: 72.4%)" in said
    assert program.read_measured() == []
    write_photos(
        tmp_path / "one", {"n01440764": 3, "n01443537": 1}, count=2
    )  # more images, in the same folder
    assert program.main(["sam_b32", "--imagenet=folder:one"]) == 0
    assert "sam_b32, seed 0: 75.00% (" in capsys.readouterr().out


def test_all_rows_that_were_not_measured_yet_are_tested(program):
    fine_tuned = [name for case in FINE_TUNED for name in case.values]
    assert EVALUATED == [name for name, row in program.ROWS.items() if row.weights]
    measured = {"mnist", "class_project", "digits"}  # digits is the row of these tests
    assert {*program.ROWS} == {*FROM_SCRATCH, *fine_tuned, *PAPER, *EVALUATED, *measured}
