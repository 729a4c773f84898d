"""Runs in a remote run directory, with real processes that are killed and an S3 server on this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from remote_runs import CHANGES, TRAIN, arguments, complete, start, wait_for

from mlpmixer_flax import UserError, fit, load, load_config
from mlpmixer_flax.remote import WORKING_COPIES, connect, copy_of, list_files
from mlpmixer_flax.run_weights import open_run
from mlpmixer_flax.rundir import MARKER, saved_steps
from mlpmixer_flax.train import main
from mlpmixer_flax.training import mirror, remote_lock
from mlpmixer_flax.training.mirror import mirrored
from mlpmixer_flax.training.report import TIMINGS, read_metrics

pytestmark = pytest.mark.usefixtures("quick_lock")


def rows(workdir):
    return [
        {key: value for key, value in row.items() if key not in TIMINGS}
        for row in read_metrics(Path(workdir) / "metrics.jsonl")
    ]


def on_another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / f"cache-{time.monotonic_ns()}"))


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_run_continues_on_another_machine_as_if_nothing_had_happened(
    bucket, tmp_path, monkeypatch, capsys
):
    url = f"{bucket}/runs/a"
    whole = tmp_path / "whole"
    config = load_config("digits.py", {**CHANGES, "total_steps": 600})
    fit(config, whole)
    process = start(url, total_steps=600)
    wait_for(lambda: complete(url), process)
    process.kill()
    process.wait()
    on_another_machine(monkeypatch, tmp_path)
    done = max(complete(url))
    assert done < 600
    capsys.readouterr()
    fit(config, url)
    output = capsys.readouterr()
    assert "waiting 2 s to see if it still is" in output.err and f"copying {url}" in output.err
    assert f"continuing from step {done} of {url}\n" in output.out and f"\n  in {url}\n" in output.out
    assert complete(url) == saved_steps(whole)
    on_another_machine(monkeypatch, tmp_path)
    model = load(f"{url}@last")
    for name in ("stem", "head"):
        np.testing.assert_array_equal(
            model.params[name]["kernel"], open_run(whole, "last").params[name]["kernel"]
        )
    assert rows(copy_of(url)) == rows(whole)
    left = {name for name in list_files(*connect(url)) if not name.startswith(("checkpoints", "events"))}
    of_a_run = {"config.json", "class_names.json", "data.json", "metrics.jsonl", "unlogged.json"}
    assert left == {*of_a_run, "mirror.json"}


@pytest.mark.long
@pytest.mark.slow
def test_what_was_not_uploaded_yet_continues_on_the_same_machine(bucket, tmp_path, monkeypatch, capsys):
    url = f"{bucket}/runs/a"
    fit(load_config("digits.py", {**CHANGES, "total_steps": 20}), url)
    uploaded = complete(url)
    copy = copy_of(url, folder=WORKING_COPIES)
    process = start(url, upload_seconds=1000, total_steps=1_000_000)
    wait_for(lambda: max(saved_steps(copy)) > 40, process)
    process.kill()
    process.wait()
    done = max(saved_steps(copy))
    assert complete(url) == uploaded
    capsys.readouterr()
    fit(load_config("digits.py", {**CHANGES, "total_steps": done + 10}), url)
    output = capsys.readouterr()
    assert f"continuing from step {done} of {url}\n" in output.out
    assert output.err == ""  # nothing was copied, and nobody waited for the killed process
    assert complete(url)[-1] == done + 10
    # Another machine has gone on meanwhile: this copy is the older one, and is replaced.
    mine = os.environ["MLPMIXER_CACHE"]
    on_another_machine(monkeypatch, tmp_path)
    fit(load_config("digits.py", {**CHANGES, "total_steps": done + 20}), url)
    monkeypatch.setenv("MLPMIXER_CACHE", mine)
    capsys.readouterr()
    fit(load_config("digits.py", {**CHANGES, "total_steps": done + 30}), url)
    assert f"continuing from step {done + 20} of {url}\n" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.slow
def test_sigterm_saves_and_uploads_and_a_second_run_is_refused(bucket, tmp_path, monkeypatch, capsys):
    url = f"{bucket}/runs/a"
    process = start(url, total_steps=1_000_000)
    wait_for(lambda: complete(url), process)
    assert main(arguments(url)) == 2
    assert capsys.readouterr().err == (
        f"error: {url} is in use by another process of this machine: wait until it ends, or choose another --workdir\n"
    )
    on_another_machine(monkeypatch, tmp_path)
    assert main(arguments(url)) == 2
    assert f"error: {url} is in use by process {process.pid} on " in capsys.readouterr().err
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert (
        f"SIGTERM: saved step {max(complete(url))}; the same command with --workdir={url} continues" in output
    )
    assert remote_lock.LOCK not in list_files(*connect(url))


class Killed(BaseException):
    """The process is killed here."""


class Mortal:
    """A file system of fsspec that dies after some changes; it uploads files one by one."""

    def __init__(self, fs, changes):
        self._fs, self._left = fs, changes

    def __getattr__(self, name):
        return getattr(self._fs, name)

    def _change(self):
        if not self._left:
            raise Killed
        self._left -= 1

    def pipe_file(self, *args, **options):
        self._change()
        self._fs.pipe_file(*args, **options)

    def rm_file(self, path):
        self._change()
        self._fs.rm_file(path)

    def put(self, files, paths):
        for file, path in zip(files, paths, strict=True):
            self._change()
            self._fs.put_file(file, path)


def make_checkpoint(folder, step, content):
    path = folder / "checkpoints" / str(step)
    shutil.rmtree(path, ignore_errors=True)
    (path / "default" / "d").mkdir(parents=True)
    for name in (MARKER, "commit_success.txt", "default/manifest", f"default/d/{content}"):
        (path / name).write_text(content)


def contents(url):
    """Returns step -> content of the complete checkpoints at a remote path; each must be whole."""
    fs, root = connect(url)
    found = {}
    for step in complete(url):
        texts = {fs.cat_file(path).decode() for path in fs.find(f"{root}/checkpoints/{step}")}
        assert len(texts) == 1 and len(fs.find(f"{root}/checkpoints/{step}")) == 4, texts
        found[step] = texts.pop()
    return found


def changes_of_a_run(copy):
    """Changes a run as training does: a newer checkpoint, an older one removed, one trained again, a row of metrics."""
    make_checkpoint(copy, 30, "new")
    make_checkpoint(copy, 20, "again")
    shutil.rmtree(copy / "checkpoints" / "10")
    (copy / "metrics.jsonl").write_text("{}\n{}\n")


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_kill_at_any_moment_of_an_upload_leaves_whole_checkpoints(tmp_path, monkeypatch, same_machine):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    for changes in range(100):
        url = f"memory://{tmp_path.name}/{changes}"
        copy = copy_of(url, folder=WORKING_COPIES)
        with mirrored(url):
            for step in (10, 20):
                make_checkpoint(copy, step, "old")
            (copy / "metrics.jsonl").write_text("{}\n")
        assert contents(url) == {10: "old", 20: "old"}
        one = mirror._Mirror(url, copy)
        one._fs = Mortal(one._fs, changes)
        changes_of_a_run(copy)
        with one.lock.held():
            try:
                one.upload()
                killed = False
            except Killed:
                killed = True
        found = contents(url)
        # There is always one to continue from.
        assert found.items() <= {10: "old", 20: "old"}.items() | {20: "again", 30: "new"}.items()
        assert 10 in found or 30 in found
        if not same_machine:
            monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / f"other-{changes}"))
            copy = copy_of(url, folder=WORKING_COPIES)
        with mirrored(url):
            here = set(saved_steps(copy))
            assert here == ({20, 30} if same_machine else set(found))
            changes_of_a_run(copy) if not same_machine and 10 in here else None
        if same_machine or 10 in here:
            assert contents(url) == {20: "again", 30: "new"}
            # Nothing is left of interrupted uploads.
            names = [name for name in list_files(*connect(url)) if name.startswith("checkpoints/")]
            assert len(names) == 8, names
        monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
        if not killed:
            assert changes > 12
            return
    raise AssertionError("the upload never ended")


def test_scores_that_are_added_to_a_checkpoint_are_uploaded_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/run"
    with mirrored(url) as copy:
        (copy / "config.json").write_text("{}")
        make_checkpoint(copy, 10, "10")
    fs, root = connect(url)
    marker = f"{root}/checkpoints/10/{MARKER}"
    before = fs.info(marker)["created"]
    with mirrored(url) as copy:
        (copy / "checkpoints" / "10" / "metrics").mkdir()
        (copy / "checkpoints" / "10" / "metrics" / "metrics").write_text("{}")
    assert fs.cat_file(f"{root}/checkpoints/10/metrics/metrics") == b"{}"
    assert fs.info(marker)["created"] == before  # so that the checkpoint was complete all the time


# --- when a copy is kept


def killed_before_an_upload(url, *steps):
    """A run on this machine that saves these steps, and is killed before it uploads them."""
    one = mirror._Mirror(url, copy_of(url, folder=WORKING_COPIES))
    one.copy.mkdir(parents=True, exist_ok=True)
    with one.lock.held():
        one.begin()
        (one.copy / "config.json").write_text("{}")
        for step in steps:
            make_checkpoint(one.copy, step, f"{step}")


def steps_of_the_next_start(url):
    """The steps from which the next start on this machine may continue; it uploads them."""
    with mirrored(url) as copy:
        steps = saved_steps(copy)
    assert [*contents(url)] == steps
    return steps


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The address of a run, which is not there yet, and a function that goes to the machine of a name."""

    def go_to(machine):
        monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / machine))

    go_to("first")
    return f"memory://{tmp_path.name}/run", go_to


def test_a_run_that_was_never_uploaded_is_kept(run, capsys):
    url, go_to = run
    killed_before_an_upload(url, 10, 20)
    assert steps_of_the_next_start(url) == [10, 20]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", ["nothing", "checkpoints/10", "config.json", "mirror.json"])
def test_a_run_that_was_deleted_there_is_uploaded_again(run, left, capsys):
    """The deletion may have ended early, or the run may have written a file again meanwhile."""
    url, _ = run
    killed_before_an_upload(url, 10, 20)
    assert steps_of_the_next_start(url) == [10, 20]
    fs, root = connect(url)
    for path in fs.find(root):
        if not path.startswith(f"{root}/{left}"):
            fs.rm_file(path)
    capsys.readouterr()
    assert steps_of_the_next_start(url) == [10, 20]
    assert fs.cat_file(f"{root}/config.json") == b"{}"
    copy = copy_of(url, folder=WORKING_COPIES)
    note = f"the run in {copy} continues and is uploaded; to begin anew, choose another --workdir\n"
    assert capsys.readouterr().err == ("" if left == "mirror.json" else f"no checkpoint is at {url}: {note}")


def test_a_run_that_another_machine_has_begun_without_a_checkpoint_is_kept(run):
    url, go_to = run
    killed_before_an_upload(url, 10)
    go_to("second")
    killed_before_an_upload(url)
    assert steps_of_the_next_start(url) == []
    go_to("first")
    assert steps_of_the_next_start(url) == [10]
    go_to("second")
    assert steps_of_the_next_start(url) == [10]


def test_a_run_that_another_machine_takes_over_and_does_not_upload_is_kept_on_both(run):
    url, go_to = run
    killed_before_an_upload(url, 10)
    assert steps_of_the_next_start(url) == [10]
    killed_before_an_upload(url, 20)
    go_to("second")
    killed_before_an_upload(url, 30)
    killed_before_an_upload(url, 40)
    go_to("first")
    assert steps_of_the_next_start(url) == [10, 20]
    go_to("second")  # the first has gone on since
    assert steps_of_the_next_start(url) == [10, 20]
    killed_before_an_upload(url, 50)
    assert steps_of_the_next_start(url) == [10, 20, 50]
    go_to("first")
    assert steps_of_the_next_start(url) == [10, 20, 50]


def test_a_run_that_somebody_has_copied_there_replaces_none_that_went_on_from_it(run):
    url, go_to = run
    killed_before_an_upload(url, 10)
    assert steps_of_the_next_start(url) == [10]
    fs, root = connect(url)
    fs.rm_file(f"{root}/mirror.json")  # as in a copy of the run directory of a local run
    go_to("second")
    killed_before_an_upload(url, 20)
    assert steps_of_the_next_start(url) == [10, 20]
    go_to("first")
    assert steps_of_the_next_start(url) == [10, 20]


# --- errors


def test_a_run_that_cannot_begin_leaves_nothing(bucket, capsys):
    url = f"{bucket}/runs/a"
    with pytest.raises(UserError, match="split 'nothing' of dataset 'digits' cannot be read"):
        fit(load_config("digits.py", {**CHANGES, "train_split": "nothing"}), url)
    assert list_files(*connect(url)) == {}
    with pytest.raises(
        UserError, match=r"^s3://.*-x/run cannot be reached \(The specified bucket does not exist\)"
    ):
        fit(load_config("digits.py", CHANGES), f"{bucket}-x/run")


@pytest.mark.long
@pytest.mark.slow
def test_a_run_goes_on_without_the_network_and_says_so_once(bucket, tmp_path, s3_server):
    url = f"{bucket}/runs/a"
    # A checkpoint every two seconds: they are removed before they are uploaded if they come faster than the upload is.
    process, relay = start_over_a_relay(
        url, s3_server, upload_seconds=0.2, save_every_steps=400, eval_every_steps=400
    )
    wait_for(lambda: complete(url), process)
    relay.cut()
    copy = copy_of(url, folder=WORKING_COPIES)
    line = process.stderr.readline()
    assert (
        line.startswith(f"{url} cannot be reached (")
        and f"the run goes on in {copy}, and is uploaded" in line
    )
    done = max(saved_steps(copy))
    wait_for(lambda: max(saved_steps(copy)) > done, process)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and error.count("cannot be reached") == 1
    assert (
        f"; to upload the rest of the run from {copy}, run the same command again on this machine"
        in error.splitlines()[-1]
    )
    done = max(saved_steps(copy))
    assert max(complete(url)) < done
    fit(load_config("digits.py", {**CHANGES, "total_steps": done + 10}), url)
    assert max(complete(url)) == done + 10


@pytest.mark.long
@pytest.mark.slow
def test_a_run_that_loses_the_network_before_its_first_upload_is_uploaded_by_the_next_start(
    bucket, s3_server, capsys
):
    url = f"{bucket}/runs/a"
    copy = copy_of(url, folder=WORKING_COPIES)
    process, relay = start_over_a_relay(url, s3_server, upload_seconds=1000)
    wait_for(lambda: saved_steps(copy), process)
    relay.cut()
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert "run the same command again on this machine" in error.splitlines()[-1]
    assert list_files(*connect(url)).keys() == {remote_lock.LOCK}
    done = max(saved_steps(copy))
    fit(load_config("digits.py", {**CHANGES, "total_steps": done + 10}), url)
    output = capsys.readouterr()
    assert f"continuing from step {done} of {url}\n" in output.out and output.err == ""
    assert max(complete(url)) == done + 10


@pytest.mark.long
@pytest.mark.slow
def test_a_run_whose_directory_is_deleted_stops_and_the_next_start_uploads_it_again(bucket, capsys):
    url = f"{bucket}/runs/a"
    process = start(url, total_steps=1_000_000)
    wait_for(lambda: complete(url), process)
    connect(url)[0].rm(url, recursive=True)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    copy = copy_of(url, folder=WORKING_COPIES)
    assert f"its files are in {copy}; if nothing is at {url} any more, the same command" in output
    done = max(saved_steps(copy))
    fit(load_config("digits.py", {**CHANGES, "total_steps": done + 10}), url)
    output = capsys.readouterr()
    assert f"continuing from step {done} of {url}\n" in output.out
    assert max(complete(url)) == done + 10
    assert {"config.json", "class_names.json", "data.json"} <= list_files(*connect(url)).keys()


def start_over_a_relay(url, s3_server, *, upload_seconds, **changes):
    """Starts a run in another process; returns it, and the connection over which it reaches the directory."""
    relay = Relay(int(s3_server.rpartition(":")[2]))
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", "AWS_MAX_ATTEMPTS": "1"}
    changes["total_steps"] = 1_000_000
    command = [sys.executable, "-u", "-c", TRAIN, str(upload_seconds), *arguments(url, **changes)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | address
    )
    threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True).start()
    return process, relay


class Relay:
    """Passes connections on to a port of this machine, until it is cut."""

    def __init__(self, target):
        import socket

        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open = []
        self._make = lambda: socket.create_connection(("127.0.0.1", target))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                pair = self._server.accept()[0], self._make()
                self._open += pair
                for one, other in (pair, pair[::-1]):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one, other):
        with contextlib.suppress(OSError):
            while block := one.recv(2**16):
                other.sendall(block)
        with contextlib.suppress(OSError):
            other.shutdown(2)

    def cut(self):
        for connection in (self._server, *self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(2)
            connection.close()
