"""What docs/ says is run, or at least understood, by what it speaks of; test_readme.py follows its links."""

import importlib
import json
import re
import runpy
import tomllib

import numpy as np
import pytest
from documented import ROOT, commands_below, run, words_of
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.weights.catalog import PUBLISHED

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# (page, what follows the fence, content)
BLOCKS = [
    (page.name, *block)
    for page in PAGES
    for block in re.findall(r"^```([\w ]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
]
CODE = [(page, language, code) for page, language, code in BLOCKS if language.startswith("python")]
COMMANDS = [
    (page, line)
    for page, language, text in BLOCKS
    if not language
    for line in text.replace("\\\n", "").splitlines()
    if "mlpmixer_flax." in line
]

PROGRAMS = "train evaluate predict analyze embed export summary pretrained benchmark".split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder in which the recipe for own photos has been followed: real images, a tiny model."""
    place = tmp_path_factory.mktemp("own")
    digits = open_examples("digits", "train[:200]")
    for row, (image, label) in enumerate(zip(*digits.read(np.arange(len(digits))), strict=True)):
        file = place / "photos" / f"digit {label}" / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0]).save(file)
    test = open_examples("digits", "test[:3]")
    (place / "holiday").mkdir()
    for row, image in enumerate(test.read(np.arange(3))[0]):
        Image.fromarray(image[:, :, 0]).convert("RGB").save(place / "holiday" / f"{row}.webp", lossless=True)
    Image.open(place / "holiday" / "0.webp").save(place / "new.jpg")
    return place


@pytest.fixture(scope="module")
def recipe(photos):
    """The commands of two sections, after they were run."""
    headings = ("Your own photos", "Features and similar images")
    commands = [command for heading in headings for command in commands_below("recipes.md", heading)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(photos)
        for command in commands:
            program, arguments = words_of(command)
            if program == "train":  # of a size for two cores, from random weights
                overrides = [a for a in arguments if not a.startswith("--config=")]
                arguments = [
                    "--config=configs/digits.py",
                    "--config.total_epochs=2",
                    "--config.model.num_blocks=1",
                    *overrides,
                ]
            assert run(program, arguments) == 0, command
    return commands


@pytest.mark.slow
def test_recipe_for_own_photos_is_followed_from_the_folder_to_a_file(photos, recipe):
    programs = "train evaluate predict predict export embed embed".split()
    assert [words_of(command)[0] for command in recipe] == programs
    assert (photos / "holiday.png").exists() and (photos / "train.parquet").exists()
    assert (photos / "runs" / "photos" / "evaluation" / "scores.json").exists()
    assert (photos / "photos.stablehlo").stat().st_size > 0
    config = json.loads((photos / "runs" / "photos" / "config.json").read_text())
    assert config["dataset"] == f"folder:{photos / 'photos'}"  # which is found from other directories, too


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, code", [(page, code) for page, language, code in CODE if language != "python"]
)
def test_code_marked_to_be_run_runs(page, code, photos, recipe, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize(
    "page, code", [(page, code) for page, language, code in CODE if language == "python"]
)
def test_other_code_is_python(page, code):
    compile(code, page, "exec")


def check(command: str) -> None:
    """That a program parses its options, that its config has the keys, and that its weights are published."""
    program, arguments = words_of(command)
    parsed = importlib.import_module(f"mlpmixer_flax.{program}").parse(arguments)
    if getattr(parsed, "config", None) and hasattr(parsed, "overrides"):
        load_config(str(ROOT / parsed.config), parsed.overrides)
    weights = [getattr(parsed, "weights", None), *getattr(parsed, "source", [])]
    assert {*weights} - {None} <= PUBLISHED.keys()


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command_is_parsed_by_its_program(page, command):
    check(command)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_80_columns_and_its_examples_are_parsed(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        run(program, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    examples = text.partition("examples:\n")[2].replace("\\\n", "").splitlines()
    examples = [line for line in examples if line.strip().startswith("python -m")]
    assert examples or program == "pretrained"
    for example in examples:
        check(example)


@pytest.mark.parametrize(
    "command",
    [
        "predict --top=many --workdir=runs/b16 new.jpg",
        "predict --workdir=runs/b16 --weights=imagenet1k/Mixer-B_16 a.jpg",
        "predict --weights=imagenet1k/Mixer-B_17 a.jpg",
        "train --config=configs/digits.py --config.total_stepz=3",
        "export --workdir=runs/b16 --format=tflite --output=b16.tflite",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((SystemExit, UserError, AssertionError)):
        check(f"python -m mlpmixer_flax.{command}")


def test_commands_of_others_name_files_and_extras_that_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = 0
    for page in PAGES:
        for script in re.findall(r"\bpython ((?:tools|benchmarks)/\w+\.py)", page.read_text()):
            assert (ROOT / script).exists(), script
            found += 1
        for extra in re.findall(r'pip install (?:-e )?"[\w.-]*\[(\w+)\]"', page.read_text()):
            assert extra in extras, extra
            found += 1
        for tests in re.findall(r"python -m pytest (\S+\.py)", page.read_text()):
            assert (ROOT / tests).exists(), tests
            found += 1
    assert found > 10


def test_each_of_the_ten_questions_is_answered_by_a_command():
    text = (ROOT / "docs" / "faq.md").read_text()
    answers = re.split(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)[1:]
    assert answers[::2] == [str(number) for number in range(1, 11)]
    assert all(re.search(r"^```\npython", answer, re.MULTILINE) for answer in answers[1::2])


def test_pages_written_by_a_tool_are_as_it_writes_them():
    tool = runpy.run_path(str(ROOT / "tools" / "write_docs.py"))
    weights = (ROOT / "docs" / "weights.md").read_text()
    assert (ROOT / "docs" / "configuration.md").read_text() == tool["write_configuration"](), "run the tool"
    assert weights == tool["write_weights"](weights), "run the tool"
