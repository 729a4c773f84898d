"""Who may import whom, and that importing does nothing (the rules are explained in CONTRIBUTING.md)."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mlpmixer_flax"

LAYER_0 = "config models dataloader augment sharding pretrained checkpoint metrics tabulate".split()
PROGRAMS = "train predict export analyze summary benchmark".split()
# module -> modules of ours that it may import
ALLOWED = {
    "__init__": set(),
    "atomic": set(),  # how layer 0 writes files
    "randaugment": set(),  # a part of augment
    "images": set(),
    "folders": set(),  # a part of datasets
    "datasets": {"folders", "images"},  # a part of dataloader
    "weightfiles": {"atomic"},
    "fit": set(),
    "download": set(),
    "figures": {"atomic", "scores"},
    "fewshot": set(),
    "terminal": set(),
    "scores": {"terminal"},
    **{module: set() for module in LAYER_0},
    "checkpoint": {"atomic"},
    "metrics": {"atomic"},
    "augment": {"randaugment"},
    "dataloader": {"datasets", "images"},
    "configfile": {"config", "validate"},
    "validate": {"config"},
    "step": {"augment"},
    "published": {"config"},
    "pretrained": {"checkpoint", "download", "fit", "published", "terminal", "weightfiles"},
    "plan": {"config", "dataloader", "models", "pretrained", "sharding", "step"},
    # what every program after training starts from
    "trained": {
        "augment",
        "checkpoint",
        "dataloader",
        "download",
        "fit",
        "models",
        "pretrained",
        "step",
        "weightfiles",
    },
    "shuffling": {"dataloader", "evaluate", "metrics", "plan", "sharding", "trained"},
    "evaluate": {
        "atomic",
        "dataloader",
        "figures",
        "folders",
        "scores",
        "sharding",
        "step",
        "terminal",
        "trained",
    },
    **{
        program: {
            *LAYER_0,
            *"atomic configfile evaluate fewshot figures folders images plan published shuffling step terminal trained validate weightfiles".split(),
        }
        for program in PROGRAMS
    },
}
# What the package root itself defines; its other names are other modules' under a shorter name.
ROOT_NAMES = {"UserError", "__version__"}

LIBRARY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.py"))
MODULES = [Path(file).stem for file in LIBRARY if Path(file).stem != "__init__"]


def imports(file: str) -> set[str]:
    """Dotted names of all that a file imports, inside functions too; `from a import b` gives "a.b"."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"), file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
            found |= {f"{home}.{alias.name}" for alias in node.names}
    return found


def run_python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", LIBRARY)
def test_module_imports_only_what_its_layer_may(file):
    module = Path(file).stem
    assert file == f"{PACKAGE}/{module}.py", f"{file}: modules lie side by side in {PACKAGE}/."
    assert module in ALLOWED, f"{file} has no layer yet: add it to ALLOWED in tests/test_imports.py."
    ours = {name.split(".")[1] for name in imports(file) if name.startswith(f"{PACKAGE}.")}
    forbidden = ours - ROOT_NAMES - ALLOWED[module]
    assert not forbidden, f"{file} may not import {sorted(forbidden)}."


@pytest.mark.parametrize("file", CONFIGS)
def test_config_imports_only_the_base_config(file):
    others = {name for name in imports(file) if not f"{name}.".startswith(f"{PACKAGE}.config.")}
    assert not others, f"{file} imports {sorted(others)}: a config imports {PACKAGE}.config and nothing else."


@pytest.mark.parametrize("file", LIBRARY + CONFIGS)
def test_nothing_imports_tensorflow_pickle_or_what_stands_outside_the_package(file):
    forbidden = {"tensorflow", "pickle", "configs", "notebooks", "benchmarks", "tests", "tools"}
    found = {name.split(".")[0] for name in imports(file)} & forbidden
    assert not found, f"{file} may not import {sorted(found)}."


def test_no_module_is_named_utils():
    named = [
        path.name for place in (PACKAGE, "configs", "tests") for path in (ROOT / place).rglob("*utils*.py")
    ]
    assert not named, f"{named}: name a module after what it does."


def test_every_imported_package_is_declared():
    homes = importlib.metadata.packages_distributions()
    used = {name.split(".")[0] for file in LIBRARY for name in imports(file)}
    used -= {PACKAGE, *sys.stdlib_module_names}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["hub"]]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    missing = {name for name in used if not declared & {normal(home) for home in homes.get(name, [name])}}
    assert not missing, f"Add to pyproject.toml's dependencies what provides {sorted(missing)}."


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_importing_the_package_is_quick_and_loads_no_jax():
    code = f"""
import sys, time
start = time.perf_counter()
import {PACKAGE}
print(time.perf_counter() - start)
assert "jax" not in sys.modules
"""
    assert min(float(run_python(code)) for _ in range(5)) < 0.2


def test_importing_any_module_does_nothing():
    # One process for all: what a module leaves behind is seen right after it.
    code = f"""
import importlib, resource, sys
from absl import flags
from jax._src import xla_bridge

limits = resource.getrlimit(resource.RLIMIT_NOFILE)
for name in sys.argv[1:]:
    importlib.import_module("{PACKAGE}." + name)
    ours = [module for module in flags.FLAGS.flags_by_module_dict() if module.startswith("{PACKAGE}")]
    assert not ours, f"{{name}} defines flags when imported"
    assert not xla_bridge.backends_are_initialized(), f"{{name}} starts a JAX backend when imported"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits, f"{{name}} changes a limit when imported"
    assert "tensorflow" not in sys.modules, f"{{name}} loads TensorFlow when imported"
"""
    assert run_python(code, *MODULES) == "", "a module prints when it is imported"
