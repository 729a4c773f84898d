"""The notebooks: run from top to bottom as they stand, and what of them is committed."""

import ast
import base64
import functools
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
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
    """A function that runs a notebook, once, with the tool that writes the committed outputs; returns its cells."""
    output = tmp_path_factory.mktemp("executed")

    @functools.cache
    def run(name):
        command = [sys.executable, ROOT / "tools" / "run_notebooks.py", name, f"--output={output}"]
        done = subprocess.run(command, cwd=output, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr  # it stops at the first cell that fails
        return read(output / NOTEBOOKS[name].name)

    return run


def test_there_are_both():
    assert list(NOTEBOOKS) == ["finetune", "token_mixing"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", pytest.param("token_mixing", marks=pytest.mark.long)])
def test_every_cell_runs_and_draws_what_it_draws_in_the_committed_notebook(name, executed):
    committed = read(NOTEBOOKS[name])
    cells = executed(name)
    assert {key: len(pictures(cell)) for key, cell in cells.items()} == {
        key: len(pictures(cell)) for key, cell in committed.items()
    }
    counts = [cell.execution_count for cell in cells.values() if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.slow
def test_finetuning_shows_lines_with_the_time_left_and_learns(executed):
    cells = executed("finetune")
    lines = re.findall(r"^step (\d+)/100, .* ETA \d\d:\d\d$", printed(cells["finetune"]), re.MULTILINE)
    assert list(map(int, lines)) == list(range(10, 101, 10))
    assert "five" in printed(cells["accuracy"]) and "zero" not in printed(cells["accuracy"])
    best = re.search(r"^best: ([\d.]+)% at", printed(cells["finetune"]), re.MULTILINE)[1]
    assert float(best) > 90
    # The same split under the same name as in the lines of the training.
    assert f": validation accuracy 0.{best.replace('.', '')}, " in printed(cells["finetune"])
    assert printed(cells["accuracy"]).startswith(f"validation accuracy {best}% of ")


@pytest.mark.long
@pytest.mark.slow
def test_features_of_a_trained_mixer_are_worth_more_than_those_of_an_untrained_one(executed):
    lines = printed(executed("token_mixing")["fewshot"]).splitlines()
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
        assert not re.search(r"Traceback|\x1b|\r|█|(?<![\w/:.])/\w+/\w", text), cell.id


@every_notebook
def test_text_before_each_cell_says_what_it_does(name):
    kinds = [cell.cell_type for cell in read(NOTEBOOKS[name]).values()]
    assert all(before == "markdown" for before, kind in zip(kinds, kinds[1:], strict=False) if kind == "code")
    assert kinds[0] == "markdown"


@every_notebook
def test_the_device_is_named_and_so_are_the_way_to_a_gpu_and_the_time(name):
    cells = read(NOTEBOOKS[name])
    assert re.search(r"^JAX [\d.]+ uses \d+ x \w", printed(cells["imports"]), re.MULTILINE)
    assert "Runtime > Change runtime type" in cells["imports"].source
    assert re.search(r"^\| time \| .*\d s .* \| .*not measured yet", cells["text-00"].source, re.MULTILINE)


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
    assert code_of(read(NOTEBOOKS[name])["switch"]).startswith("TINY = True")


def test_the_real_thing_is_one_switch_away():
    cells = read(NOTEBOOKS["finetune"])
    code = code_of(cells["switch"]).replace("TINY = True", "TINY = False", 1)
    code += "\n" + code_of(cells["parameters"])
    names = {"mf": mlpmixer_flax, "Path": Path}
    exec(code, names)
    validate(names["config"])
    assert (names["config"].init_from, names["config"].dataset) == ("imagenet21k/Mixer-B_16", "cifar10")
    assert names["config"].total_steps == 100


BADGE = r"\(https://colab.research.google.com/github/([\w.-]+/[\w.-]+)/blob/main/(\S+)\)"


def test_each_badge_opens_its_own_notebook_and_all_are_of_one_repository():
    links = [
        re.findall(BADGE, "".join(cell.source for cell in read(file).values())) for file in NOTEBOOKS.values()
    ]
    assert [path for ((_, path),) in links] == [f"notebooks/{name}.ipynb" for name in NOTEBOOKS]
    assert len({repository for ((repository, _),) in links}) == 1


def test_all_notebooks_install_in_the_same_way_from_the_repository_of_the_badges():
    (cell,) = {read(file)["install"].source for file in NOTEBOOKS.values()}
    ((repository, _),) = re.findall(BADGE, read(NOTEBOOKS["finetune"])["text-00"].source)
    assert re.findall(r"https://\S+(?=\")", cell) == [f"https://github.com/{repository}"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with the packages of this one, except ours and TensorFlow; pip finds no index."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(root)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "mlpmixer" not in entry.name and entry.name != "tensorflow":
            (packages / entry.name).symlink_to(entry)
    return root / "bin" / "python"


def no_index(tmp_path, *, repository):
    """Variables for processes of `bare`: git reads this folder in place of github.com."""
    return {
        "PYTHONPATH": "",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_QUIET": "0",  # a test reads its messages
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/mlpmixer-flax/mlpmixer-flax",
        "TFDS_DATA_DIR": str(tmp_path / "tfds"),
    }


@pytest.mark.slow
def test_where_pip_fails_the_notebook_stops_with_a_sentence(bare, tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "bare"
    folder.mkdir(parents=True)
    kernel = {
        "argv": [str(bare), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "env": no_index(tmp_path, repository=ROOT),  # pip clones it, and then lacks what the build requires
        "display_name": "bare",
        "language": "python",
    }
    (folder / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(NOTEBOOKS["finetune"], as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    resources = {"metadata": {"path": str(tmp_path)}}
    with pytest.raises(CellExecutionError) as stopped:
        NotebookClient(notebook, kernel_name="bare", timeout=120, resources=resources).execute()
    assert stopped.value.ename == "RuntimeError"
    assert stopped.value.evalue.startswith("the installation failed: read pip's message above")
    ran = {cell.id: cell for cell in notebook.cells if cell.get("execution_count")}
    assert list(ran) == ["switch", "install"]
    assert "No matching distribution found for setuptools" in printed(ran["install"])


FROM_REPOSITORY = "@ git+https://github.com/mlpmixer-flax/mlpmixer-flax"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiny", "dataset", "in_clone", "on_disk", "wanted"),
    [
        (True, "digits", False, [], ["mlpmixer-flax {url}"]),
        (True, "digits", True, [], ["mlpmixer-flax @ {clone}"]),
        (False, "cifar10", False, [], ["mlpmixer-flax[prepare] {url}"]),
        (False, "cifar10", False, ["tfds/cifar10"], ["mlpmixer-flax {url}"]),
        (False, "cifar10", False, ["on_path/tensorflow"], ["mlpmixer-flax {url}"]),
        (False, "cifar10", False, ["on_path/mlpmixer_flax"], ["mlpmixer-flax[prepare]"]),
        (False, "folder:photos", False, ["on_path/libtpu"], ["mlpmixer-flax {url}", "jax[tpu]"]),
        (True, "digits", False, ["on_path/jax_cuda12_plugin"], ["mlpmixer-flax {url}", "jax[cuda12]"]),
    ],
)
def test_the_installation_fits_the_machine(bare, tmp_path, tiny, dataset, in_clone, on_disk, wanted):
    clone = tmp_path / "clone"
    for folder in ["clone/notebooks", *(["clone/mlpmixer_flax"] if in_clone else []), *on_disk]:
        (tmp_path / folder).mkdir(parents=True)
    source = f"TINY, DATASET = {tiny}, {dataset!r}\n" + read(NOTEBOOKS["finetune"])["install"].source
    done = subprocess.run(
        [bare, "-c", source],
        cwd=clone / "notebooks",
        env=os.environ | no_index(tmp_path, repository="absent") | {"PYTHONPATH": str(tmp_path / "on_path")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "RuntimeError: the installation failed" in done.stderr
    said = re.match(r"installing\n((  \S.*\n)+)  numpy==[\d.]+\n", done.stdout)[1]
    assert said == "".join(f"  {line.format(url=FROM_REPOSITORY, clone=clone.as_uri())}\n" for line in wanted)
