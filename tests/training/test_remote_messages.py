"""Messages about a remote run name the address that the user gave, and not the copy on this machine."""

import errno
import shutil

import pytest

from mlpmixer_flax import UserError, get_config
from mlpmixer_flax.faults import explain
from mlpmixer_flax.remote import WORKING_COPIES, copy_of
from mlpmixer_flax.run_weights import open_run
from mlpmixer_flax.rundir import read_class_names, read_config
from mlpmixer_flax.training import continuing, record
from mlpmixer_flax.training.advice import advising
from mlpmixer_flax.training.lock import RunLock

URL = "s3://bucket/runs/a"


@pytest.fixture(params=[WORKING_COPIES, "remote"])
def copy(request, tmp_path, monkeypatch, digits_run):
    """The copy of a remote run, as training and as other programs use it."""
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    folder = copy_of(URL, folder=request.param)
    assert folder
    shutil.copytree(digits_run, folder)
    return folder


def without_its_config(copy):
    (copy / "config.json").unlink()
    continuing.usable_workdir(copy)


def with_another_config(copy):
    stored = read_config(copy)
    continuing.compare_configs(copy, stored, {**stored, "seed": 5})


def with_other_data(copy):
    stored = record.read_record(copy)
    record.check_data(copy, stored, {**stored, "dataset": "other"})


def with_another_teacher(copy):
    record.check_data(copy, {record.TEACHER: "a"}, {record.TEACHER: "b"})


def shorter_than_it_is(copy):
    config = get_config()
    config.total_steps = 3
    continuing.check_length(copy, config, steps_per_epoch=10)


def used_twice(copy):
    first = RunLock(copy)
    first.take()
    try:
        RunLock(copy).take()
    finally:
        first.close()


def with_a_damaged(name, read):
    def damage(copy):
        (copy / name).write_text("{")
        read(copy)

    return damage


def a_folder_without_a_run(copy):
    (copy / "config.json").unlink()
    open_run(copy)


def without_checkpoints(copy):
    shutil.rmtree(copy / "checkpoints")
    open_run(copy, "last")


REFUSED = {
    "without its config": without_its_config,
    "with another config": with_another_config,
    "with other classes": lambda copy: continuing.check_class_names(copy, ["a", "b"]),
    "with other data": with_other_data,
    "with another teacher": with_another_teacher,
    "shorter than it is": shorter_than_it_is,
    "used twice": used_twice,
    "damaged config": with_a_damaged("config.json", read_config),
    "damaged class names": with_a_damaged("class_names.json", read_class_names),
    "no run": a_folder_without_a_run,
    "a step that was not saved": lambda copy: open_run(copy, "7"),
    "no checkpoint": without_checkpoints,
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_an_error_names_the_address(use, copy, tmp_path):
    with pytest.raises(UserError) as raised:
        use(copy)
    assert URL in str(raised.value) and str(tmp_path) not in str(raised.value)


def test_a_fault_of_the_disk_names_the_folder_on_it_and_the_address_to_continue_with(copy):
    with pytest.raises(OSError, match="No space left") as raised, advising(copy):
        raise OSError(errno.ENOSPC, "No space left on device", str(copy / "metrics.jsonl"))
    sentence = explain(raised.value)
    assert f"({copy / 'metrics.jsonl'}): make room there" in sentence
    assert f"the same command with --workdir={URL} continues from there" in sentence


def test_lines_about_damaged_files_name_the_address(copy, tmp_path, capsys):
    (copy / "data.json").write_text("{")
    assert record.read_record(copy) == {}
    output = capsys.readouterr().out
    assert f"{URL}/data.json is damaged" in output and str(tmp_path) not in output
