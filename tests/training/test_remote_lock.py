"""The lock of a remote run directory."""

import contextlib
import json
import os
import re
import signal
import threading
import time

import fsspec
import pytest
from remote_runs import complete, start, wait_for

from mlpmixer_flax import UserError
from mlpmixer_flax.training import mirror, remote_lock
from mlpmixer_flax.training.remote_lock import RemoteLock

pytestmark = pytest.mark.usefixtures("quick_lock")


def test_a_lock_that_is_written_is_respected_and_one_that_is_not_is_taken(bucket, capsys):
    url = f"{bucket}/run"
    first, second = RemoteLock(url, copy="a"), RemoteLock(url, copy="b")
    with first.held():
        with mirror._repeating(first.renew, seconds=0.2, failed=print):
            with pytest.raises(
                UserError, match="is in use by process .* on .*: wait until it ends, or choose"
            ):
                second._take()
        assert "waiting 2 s to see if it still is" in capsys.readouterr().err
        before = time.monotonic()
        second._take()
        assert time.monotonic() - before > 2 and first.is_lost() and not second.is_lost()
        noticed = []
        old = signal.signal(signal.SIGTERM, lambda *_: noticed.append(True))
        first.renew()
        first.renew()
        signal.signal(signal.SIGTERM, old)
        assert noticed == [True]
    assert not second.is_lost()  # the end of the first has not removed it


@pytest.mark.parametrize(
    ("content", "owner"),
    [
        ("5", "another process"),
        ("[" * 100_000, "another process"),
        ('{"host": "a"}', "another process"),
        (json.dumps({"host": "a\x1b " * 9999, "process": 3}), r"process 3 on a\\x1b .{,60}…"),
        (json.dumps({"host": [], "process": 3}), "another process"),
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_lock_is_taken_like_that_of_a_killed_run(content, owner, monkeypatch, capsys):
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.01)
    lock = RemoteLock("memory://bucket/damaged", copy="a")
    lock._fs.pipe_file(lock._path, content.encode())
    with lock.held():
        assert not lock.is_lost()
    assert re.search(f" was in use by {owner}: waiting 0 s", capsys.readouterr().err)


@pytest.mark.parametrize(
    "content", ["5", "[]", '{"copy": 5, "sent": 5}', "[" * 100_000, None], ids=lambda text: repr(text)[:20]
)
def test_a_run_is_mirrored_although_what_is_known_of_its_copy_is_damaged(content, tmp_path):
    file = tmp_path / "mirror.json"
    os.mkfifo(file) if content is None else file.write_text(content)
    mirror_of = mirror._Mirror("memory://bucket/mirror", tmp_path)
    there = mirror_of._path("mirror.json")
    mirror_of._fs.pipe_file(there, (content or "").encode())
    with mirror_of.lock.held():
        mirror_of.begin()
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        mirror_of.upload()
    assert mirror_of._fs.cat_file(mirror_of._path("metrics.jsonl")) == b"{}\n"
    assert json.loads(mirror_of._fs.cat_file(there))["copy"] == json.loads(file.read_text())["copy"]


def test_of_several_that_take_a_lock_at_once_one_gets_it(bucket):
    got, refused = [], []

    def take(number):
        lock = RemoteLock(f"{bucket}/run", copy=str(number))
        with contextlib.suppress(UserError):
            lock._take()
            got.append(lock)
            return
        refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lock for lock in got if not lock.is_lost()]) == 1
    assert len(got) + len(refused) == 8


@pytest.mark.long
@pytest.mark.slow
def test_a_run_whose_lock_was_taken_stops_and_uploads_nothing_more(bucket):
    url = f"{bucket}/runs/a"
    process = start(url, total_steps=1_000_000)
    wait_for(lambda: complete(url), process)
    fsspec.filesystem("s3").pipe_file(f"{url}/{remote_lock.LOCK}", json.dumps({"token": "other"}).encode())
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert f"error: {url} was deleted, or another process has taken it over" in output.splitlines()[-1]
    assert read_lock(url) == {"token": "other"}


def read_lock(url):
    return json.loads(fsspec.filesystem("s3").cat_file(f"{url}/{remote_lock.LOCK}"))
