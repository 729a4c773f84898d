"""Who may import whom (the rule is a line of CONTRIBUTING.md), and that importing does nothing."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mlpmixer_flax"

# The rule is the line of CONTRIBUTING.md that has this form: "a < b < programs".
RULE = re.search(r"^    (\w+ < .* < programs)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)[
    1
].split(" < ")

LIBRARY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py"))
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.py"))
MODULES = [file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in LIBRARY]


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


def ours(file: str) -> set[str]:
    """Returns the modules of the package that a file imports: {"config", "data.images"}."""
    found = {name.removeprefix(f"{PACKAGE}.") for name in imports(file) if name.startswith(f"{PACKAGE}.")}
    modules = {module.partition(".")[2] for module in MODULES} - {""}
    longest = ({module for module in modules if f"{name}.".startswith(f"{module}.")} for name in found)
    return {max(matches, key=len) for matches in longest if matches}


def place(module: str) -> int:
    """Returns the position of a module's room in the rule; a module that the rule does not name is a program."""
    room = module.split(".")[0]
    return RULE.index(room if room in RULE else "programs")


@pytest.mark.parametrize("file", [file for file in LIBRARY if file != f"{PACKAGE}/__init__.py"])
def test_a_module_imports_only_rooms_that_come_before_its_own(file):
    module = file.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".")
    for other in ours(file):
        in_its_room = "." in module and module.split(".")[0] == other.split(".")[0]
        assert in_its_room or place(other) < place(module), (
            f"{file} may not import {other}: see CONTRIBUTING.md"
        )


def test_there_is_no_cycle():
    graphlib.TopologicalSorter(
        {
            file.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", "."): ours(file)
            for file in LIBRARY[1:]
        }
    ).prepare()


def test_what_the_rule_does_not_name_is_a_program():
    for file in (ROOT / PACKAGE).glob("*.py"):
        if place(file.stem) == RULE.index("programs") and file.stem != "__init__":
            assert "def main(" in file.read_text(), f"{file.name} is not a program: give it a room"


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
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["hub"], *extras["onnx"]]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    missing = {name for name in used if not declared & {normal(home) for home in homes.get(name, [name])}}
    assert not missing, f"Add to pyproject.toml's dependencies what provides {sorted(missing)}."


def test_every_dependency_has_a_reason_in_contributing():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Dependencies")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w, -]+) \| \w", table, re.MULTILINE)
    named = {normal(name) for row in rows for name in row.split(", ")} - {"package"}
    assert named == declared


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
    importlib.import_module(name)
    ours = [module for module in flags.FLAGS.flags_by_module_dict() if module.startswith("{PACKAGE}")]
    assert not ours, f"{{name}} defines flags when imported"
    assert not xla_bridge.backends_are_initialized(), f"{{name}} starts a JAX backend when imported"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits, f"{{name}} changes a limit when imported"
    assert "tensorflow" not in sys.modules, f"{{name}} loads TensorFlow when imported"
"""
    assert run_python(code, *MODULES) == "", "a module prints when it is imported"
