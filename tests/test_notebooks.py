"""The notebooks: run from top to bottom as they stand, and what of them is committed."""

import ast
import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

import mlpmixer_flax
from mlpmixer_flax.training.validate import validate

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {file.stem: file for file in sorted((ROOT / "notebooks").glob("*.ipynb"))}
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(file):
    """Cells by id, in order."""
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return {cell.id: cell for cell in notebook.cells}


def code_of(cell):
    return (
        re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.MULTILINE) if cell.cell_type == "code" else ""
    )


def printed(cell, stream="stdout"):
    return "".join(output.text for output in cell.get("outputs", []) if output.get("name") == stream)


def pictures(cell):
    pngs = [
        output.data["image/png"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in pngs]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What the tool that writes the committed outputs writes now; it stops at the first cell that fails."""
    output = tmp_path_factory.mktemp("executed")
    command = [sys.executable, ROOT / "tools" / "run_notebooks.py", f"--output={output}"]
    done = subprocess.run(command, cwd=output, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return {name: read(output / file.name) for name, file in NOTEBOOKS.items()}


def test_there_are_both():
    assert list(NOTEBOOKS) == ["finetune", "token_mixing"]


@pytest.mark.slow
@every_notebook
def test_every_cell_runs_and_draws_what_it_draws_in_the_committed_notebook(name, executed):
    committed = read(NOTEBOOKS[name])
    cells = executed[name]
    assert {key: len(pictures(cell)) for key, cell in cells.items()} == {
        key: len(pictures(cell)) for key, cell in committed.items()
    }
    counts = [cell.execution_count for cell in cells.values() if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.slow
def test_finetuning_shows_a_full_bar_and_learns(executed):
    cells = executed["finetune"]
    assert re.search(r"100%\|█+\| 100/100, ", printed(cells["finetune"]))
    assert float(re.search(r"test accuracy ([\d.]+)%", printed(cells["accuracy"]))[1]) > 90
    assert "five" in printed(cells["accuracy"]) and "zero" not in printed(cells["accuracy"])


@pytest.mark.slow
def test_features_of_a_trained_mixer_are_worth_more_than_those_of_an_untrained_one(executed):
    lines = printed(executed["token_mixing"]["fewshot"]).splitlines()
    scores = {line.split()[0]: float(line.split()[1].rstrip("%")) for line in lines}
    assert scores["trained"] > scores["untrained"] + 20


@every_notebook
def test_committed_outputs_are_small_pictures_and_text_without_warnings_or_paths_of_a_machine(name):
    assert NOTEBOOKS[name].stat().st_size < 300_000
    cells = read(NOTEBOOKS[name]).values()
    drawn = [picture for cell in cells for picture in pictures(cell)]
    assert len(drawn) >= 4
    for picture in drawn:
        assert min(picture.size) > 150 and len(picture.convert("RGB").getcolors(2**20)) > 20
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.get("outputs", [])), cell.id
        assert not printed(cell, "stderr").strip(), cell.id
        text = printed(cell) + str(
            [output.get("data", {}).get("text/plain") for output in cell.get("outputs", [])]
        )
        assert not re.search(r"Traceback|\x1b|(?<![\w/:.])/\w+/\w", text), cell.id


@every_notebook
def test_a_notebook_imports_the_package_and_defines_nothing_of_its_own(name):
    code = "\n".join(map(code_of, read(NOTEBOOKS[name]).values()))
    nodes = list(ast.walk(ast.parse(code)))
    assert not [
        node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assert any(isinstance(node, ast.ImportFrom) and node.module.startswith("mlpmixer_flax") for node in nodes)


@every_notebook
def test_a_notebook_is_committed_tiny(name):
    assert code_of(read(NOTEBOOKS[name])["parameters"]).startswith("TINY = True")


def test_the_real_thing_is_one_switch_away():
    code = code_of(read(NOTEBOOKS["finetune"])["parameters"]).replace("TINY = True", "TINY = False", 1)
    names = {"mf": mlpmixer_flax, "Path": Path}
    exec(code, names)
    validate(names["config"])
    assert (names["config"].init_from, names["config"].dataset) == ("imagenet21k/Mixer-B_16", "cifar10")
    assert names["config"].total_steps == 100


def test_each_badge_opens_its_own_notebook_and_all_are_of_one_repository():
    badge = r"\(https://colab.research.google.com/github/([\w.-]+/[\w.-]+)/blob/main/(\S+)\)"
    links = [
        re.findall(badge, "".join(cell.source for cell in read(file).values())) for file in NOTEBOOKS.values()
    ]
    assert [path for ((_, path),) in links] == [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]
    assert len({repository for ((repository, _),) in links}) == 1


@every_notebook
def test_where_the_package_is_missing_it_is_installed_beside_the_jax_that_is_there(name):
    lines = read(NOTEBOOKS[name])["install"].source.splitlines()
    (command,) = [line.strip() for line in lines if "pip" in line and not line.strip().startswith("#")]
    assert command.startswith("%pip install -q ") and "--upgrade" not in command
    assert '"jax=={jax_version}"' in command
