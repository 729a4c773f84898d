"""What docs/ says is run, or at least understood, by what it speaks of; test_readme.py follows its links."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax.configfile import load_config
from mlpmixer_flax.dataloader import open_examples

ROOT = Path(__file__).parent.parent
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


def words_of(command: str) -> tuple[str, list[str]]:
    """(program, its arguments) of python -m mlpmixer_flax.PROGRAM ..."""
    words = shlex.split(command.partition(" > ")[0])
    assert words[:2] == ["python", "-m"], command
    package, _, program = words[2].partition(".")
    assert package == "mlpmixer_flax", command
    return program, words[3:]


def is_whole(command: str, usage: str) -> bool:
    """Whether a command has each option that stands without brackets in a line of usage, or one of (A | B)."""
    needed = re.findall(r"\([^)]*\)|--\w+", re.sub(r"\[[^]]*\]", "", usage))
    return all(any(f"{option}=" in command for option in re.findall(r"--\w+", group)) for group in needed)


def run(program: str, arguments: list[str]) -> int:
    return importlib.import_module(f"mlpmixer_flax.{program}").main(arguments)


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
    """The commands of "Your own photos", and what each of them printed, by program."""
    text = (ROOT / "docs" / "recipes.md").read_text().partition("## Your own photos")[2]
    commands = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", "").splitlines()
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


def test_recipe_for_own_photos_is_followed_from_the_folder_to_a_file(photos, recipe):
    assert [words_of(command)[0] for command in recipe] == "train evaluate predict predict export".split()
    assert (photos / "runs" / "photos" / "evaluation" / "scores.json").exists()
    assert (photos / "photos.stablehlo").stat().st_size > 0


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


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command_is_understood_by_its_program(page, command, capsys):
    program, arguments = words_of(command)
    with pytest.raises(SystemExit) as stop:
        run(program, ["--help"])
    assert stop.value.code == 0
    usage = capsys.readouterr().out
    for argument in arguments:
        option, _, value = argument.partition("=")
        if set(option) & set("./"):
            continue  # a key of the config, or a file
        assert re.search(rf"{option}\b", usage), f"{program} has no {option}"
        choices = re.search(rf"{option} {{([\w,]+)}}", usage)
        assert not choices or value in choices[1].split(","), argument
    forms = usage.partition("\n\n")[0].split(f"mlpmixer_flax.{program}")[1:]
    assert any(is_whole(command, form) for form in forms), f"{command} lacks an option"
    (config,) = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")] or [None]
    if config:
        load_config(str(ROOT / config), [a for a in arguments if a.startswith("--config.")])


def test_pages_written_by_a_tool_are_as_it_writes_them():
    tool = runpy.run_path(str(ROOT / "tools" / "write_docs.py"))
    weights = (ROOT / "docs" / "weights.md").read_text()
    assert (ROOT / "docs" / "configuration.md").read_text() == tool["write_configuration"](), "run the tool"
    assert weights == tool["write_weights"](weights), "run the tool"
