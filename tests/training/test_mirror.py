"""Runs in a remote run directory, with real processes that are killed and an S3 server on this machine."""

import contextlib
import os
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
from mlpmixer_flax.rundir import saved_steps
from mlpmixer_flax.train import main
from mlpmixer_flax.training import remote_lock
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
