"""Code and commands of the README and CONTRIBUTING are run or parsed; links and file names must exist."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from mlpmixer_flax import UserError, train
from mlpmixer_flax.dataloader import get_dataset_info
from mlpmixer_flax.training.configfile import load_config

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TRAINING = [line for _, block in BLOCKS for line in block.splitlines() if "mlpmixer_flax.train" in line]


SNIPPETS = [block for language, block in BLOCKS if language == "python"]
SNIPPETS += re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.slow
@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code, tmp_path):
    try:
        get_dataset_info("cifar10")
    except UserError:
        # Without CIFAR-10, everything except its name is tried.
        code = code.replace('"cifar10"', '"digits"')
    code = code.replace("imagenet1k/Mixer-B_16", "gsam/Mixer-S_32")  # a smaller one of the published names
    environment = os.environ | {"MLPMIXER_CACHE": str(tmp_path / "cache")}
    for source in re.findall(r'(?:pretrained|mf)\.load\("(.*?)"', code):
        put_into_cache(source, environment)
    Image.new("RGB", (40, 30)).save(tmp_path / "cat.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


CACHE = """
import sys, jax, numpy as np
from mlpmixer_flax.weights import download, files
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.catalog import PUBLISHED

weights = PUBLISHED[sys.argv[1]]
model = MlpMixer(num_classes=weights.num_classes, **weights.origin["model"])
shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
place = download.cache_file(weights.url)
place.parent.mkdir(parents=True, exist_ok=True)
files.write_npz(place, jax.tree.map(lambda p: np.zeros(p.shape, np.float32), shapes), metadata={})
"""


def put_into_cache(source, environment):
    """Writes a file with the sizes of the published one, for machines without a network."""
    subprocess.run([sys.executable, "-c", CACHE, source], env=environment, check=True)


def test_there_are_the_two_commands_and_a_snippet():
    assert len(TRAINING) >= 2
    assert sum("python -m pytest" in block for _, block in BLOCKS) == 1
    assert sum(language == "python" for language, _ in BLOCKS) >= 1


@pytest.mark.parametrize("command", TRAINING)
def test_training_command_is_understood(command):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "mlpmixer_flax.train"]
    assert any(word.startswith("--workdir=") for word in words)
    arguments = train.parse(words[3:])
    load_config(str(ROOT / "configs" / Path(arguments.config or "folder.py").name), arguments.overrides)


@pytest.mark.slow
def test_first_training_command_trains(tmp_path):
    """As it stands, from process start to the end, on the embedded digits."""
    words = shlex.split(TRAINING[0])
    done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"done: test accuracy ([\d.]+)%", done.stdout)[1])
    assert accuracy >= 97.0, done.stdout
    assert (tmp_path / "runs" / "digits" / "checkpoints").is_dir()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_named_are_there(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if target.startswith("https://"):
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
    for name in re.findall(r"`([\w/.]+\.(?:py|md|toml))`", text):
        homes = [ROOT, ROOT / "configs", ROOT / "mlpmixer_flax", ROOT / "tests", ROOT / "docs"]
        assert any((home / name).exists() for home in homes), name


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_config_has_a_row_in_the_table():
    rows = "\n".join(line for line in README.splitlines() if line.startswith("| `"))
    for file in (ROOT / "configs").glob("*.py"):
        assert f"`{file.name}`" in rows, file.name


def test_docker_copies_all_that_the_package_is_built_from():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = pyproject["project"], pyproject["tool"]["setuptools"]
    needed = {"pyproject.toml", "setup.py", project["readme"], *project["license-files"]}
    needed |= {build["package-dir"].get(name, name).split(".")[0] for name in build["packages"]}
    copies = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert needed == {source for sources in copies for source in sources.split()}
