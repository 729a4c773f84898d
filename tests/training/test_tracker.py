"""Metrics in an experiment tracker: those of metrics.jsonl, in one run also after a restart, and never in the way."""

import importlib
import json
import shutil
import sys

import pytest

from mlpmixer_flax import UserError, fit, load_config
from mlpmixer_flax.training.report import TIMINGS, read_metrics
from mlpmixer_flax.training.tracker import TRACKERS

VALUES = {
    "model.hidden_dim": 8,
    "model.channels_mlp_dim": 8,
    "model.tokens_mlp_dim": 8,
    "model.num_blocks": 1,
    "augment.mixup_alpha": 0.0,
    "train_split": "train[:200]",
    "test_split": "test[:50]",
    "log_every_steps": 2,
    "eval_every_steps": 4,
    "save_every_steps": 4,
}

# A package that writes each call into a file. Trackers have servers and accounts, and the tests have no network.
PACKAGE = """
import json, pathlib
FILE = pathlib.Path(__file__).with_name("calls.jsonl")

def note(**call):
    with FILE.open("a") as file:
        file.write(json.dumps(call) + "\\n")

def fail(call):
    if FILE.with_name("fail-" + call).exists():
        raise {error}("the server has\\ngone away")

class Run:
    def log(self, metrics, step):
        fail("log")
        note(call="log", step=step, metrics=metrics)

    def finish(self):
        fail("finish")
        note(call="finish")

def init(**arguments):
    fail("init")
    note(call="init", **arguments)
    return Run()
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder in which the packages trackio and wandb note their calls."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in TRACKERS:
        error = "SystemExit" if name == "wandb" else "OSError"
        (folder / f"{name}.py").write_text(PACKAGE.replace("{error}", error))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in TRACKERS:
        sys.modules.pop(name, None)


def train(workdir, **changes):
    return fit(load_config("digits.py", VALUES | {"total_steps": 8} | changes), workdir)


def calls(package, kind):
    file = package / "calls.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row["call"] == kind]


def without_speed(rows):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_the_rows_of_metrics_jsonl_in_one_run_also_after_a_restart(name, package, tmp_path):
    workdir = tmp_path / "run"
    train(workdir, tracker=name, total_steps=6)
    train(workdir, tracker=name)
    first, second = calls(package, "init")
    assert first["name"] == second["name"] == first.get("id", first["name"]) and first["name"].startswith(
        "run-"
    )
    assert first["project"] == "mlpmixer-flax" and first["resume"] == "allow"
    assert first["config"]["optimizer.learning_rate"] == 3e-3 and first["config"]["tracker"] == name
    sent = [{"step": row["step"], **row["metrics"]} for row in calls(package, "log")]
    assert sent == read_metrics(workdir / "metrics.jsonl") and len(sent) == 4 + 3
    assert len(calls(package, "finish")) == 2


def test_rows_that_are_computed_again_are_not_sent_again(package, tmp_path):
    """A run that is killed between two checkpoints computes the updates after the first one again."""
    workdir = tmp_path / "run"
    train(workdir, tracker="trackio")
    rows = read_metrics(workdir / "metrics.jsonl")
    for step in (6, 8):  # as if it had been killed after the row of step 6: step 4 is saved
        for folder in (workdir / "checkpoints").glob(f"{step}*"):
            shutil.rmtree(folder)
    kept = [row for row in rows if row["step"] <= 6]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (package / "calls.jsonl").unlink()
    train(workdir, tracker="trackio")
    assert without_speed(read_metrics(workdir / "metrics.jsonl")) == without_speed(rows)
    assert {row["step"] for row in calls(package, "log")} == {8}
    assert len(calls(package, "log")) == 2  # training and evaluation


@pytest.mark.parametrize("before", ["", "wandb"])
def test_a_tracker_that_is_chosen_later_gets_all_rows_from_then_on(before, package, tmp_path):
    """Also those that are computed again: it has not had them."""
    workdir = tmp_path / "run"
    train(workdir, tracker=before)
    for step in (6, 8):  # as if it had been killed: step 4 is saved
        for folder in (workdir / "checkpoints").glob(f"{step}*"):
            shutil.rmtree(folder)
    (package / "calls.jsonl").unlink(missing_ok=True)
    train(workdir, tracker="trackio")
    assert [row["step"] for row in calls(package, "log")] == [6, 8, 8]


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize(
    ("call", "words"), [("init", "be started"), ("log", "has failed"), ("finish", "send the last")]
)
def test_a_failing_tracker_never_stops_a_training(name, call, words, package, tmp_path, capsys):
    (package / f"fail-{call}").touch()
    scores = train(tmp_path / "run", tracker=name)
    assert scores["step"] == 8 and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 6
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "gets no more metrics" in line]
    assert line.startswith(f"{name} ") and words in line and "the server has" in line


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        UserError, match=r"^tracker='trackio' cannot be imported \(.*\): run pip install trackio, or set"
    ):
        train(tmp_path / "run", tracker="trackio")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="^unknown tracker 'mlflow': choose one of trackio, wandb"):
        load_config("digits.py", {"tracker": "mlflow"})


def test_a_folder_that_is_named_like_a_tracker_is_not_its_package(tmp_path, monkeypatch):
    """wandb writes a folder "wandb" into the current one, and Python imports any folder."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="wandb is a folder of that name, and not the package"):
        train(tmp_path / "run", tracker="wandb")
    sys.modules.pop("wandb", None)


def test_a_file_that_is_named_like_a_tracker_is_not_its_package(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match=r"trackio.py is a file of that name, and not the package"):
        train(tmp_path / "run", tracker="trackio")
    sys.modules.pop("trackio", None)


def test_the_real_trackio_has_the_rows_of_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    workdir = tmp_path / "run"
    train(workdir, tracker="trackio", total_steps=6)
    train(workdir, tracker="trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("mlpmixer-flax")
    assert run.name == json.loads((workdir / "tracker.json").read_text())["name"]
    assert run.config["total_steps"] == 8  # that of the last start
    rows = SQLiteStorage.get_logs("mlpmixer-flax", run.name)
    found = [{key: value for key, value in row.items() if key != "timestamp"} for row in rows]
    assert found == read_metrics(workdir / "metrics.jsonl")
