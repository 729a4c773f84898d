"""Downloads that break off or are killed continue, also beside other processes, and never mix two files."""

import signal
import threading
from pathlib import Path

import pytest
from download_site import CONTENT, SENT_MD5, break_off, files, refused, start, wait_for_part

from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.download import cache_file, fetch


def test_a_dropped_download_continues_where_it_stopped(site, tmp_path, capsys):
    site.drops = [1_000_000, 500_000]
    assert fetch(site.url).read_bytes() == CONTENT
    # Each request starts with the last byte of the one before.
    rest = len(CONTENT) - 1_499_998
    assert site.log == [
        (None, 200, 1_000_000),
        ("bytes=999999-", 206, 500_000),
        ("bytes=1499998-", 206, rest),
    ]
    assert files(tmp_path) == ["Mixer-B_16.npz"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"downloading {site.url} (3.01 MiB) to {cache_file(site.url)}"


def test_a_connection_that_stalls_counts_as_dropped(site, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    site.hold, site.drops = threading.Event(), [1000]
    assert fetch(site.url).read_bytes() == CONTENT
    assert [asked for asked, _, _ in site.log] == [None, "bytes=999-"]


def test_after_a_few_tries_it_gives_up_and_the_next_run_continues(site):
    site.drops = [1000, 1000, 1000, 1000]
    message = refused(site.url)
    assert f"3,997 of {len(CONTENT):,} bytes" in message and site.url in message
    assert not cache_file(site.url).exists()
    assert len(site.log) == 4
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log[4:] == [("bytes=3996-", 206, len(CONTENT) - 3996)]


def test_a_failing_server_is_tried_again_once_the_download_has_begun(site):
    site.drops, site.statuses = [1000], [200, 503]
    assert fetch(site.url).read_bytes() == CONTENT
    assert [status for _, status, _ in site.log] == [200, 503, 206]


def test_a_server_that_ignores_ranges_makes_it_start_over(site):
    site.ranges, site.drops = False, [1000]
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log == [(None, 200, 1000), ("bytes=999-", 200, len(CONTENT))]


@pytest.mark.parametrize(
    "headers",
    [{"ETag": '"two"'}, {"Last-Modified": "Tue, 04 May 2021 10:00:00 GMT"}, {"ETag": 'W/"one"'}, {}],
)
def test_a_file_that_changed_meanwhile_is_downloaded_anew(site, tmp_path, headers):
    break_off(site)
    site.content, site.headers = CONTENT[::-1], headers
    assert fetch(site.url).read_bytes() == CONTENT[::-1]
    assert site.log[0][:2] == ("bytes=999-", 206)
    assert site.log[1:] == [(None, 200, len(CONTENT))]
    assert files(tmp_path) == ["Mixer-B_16.npz"]


def test_a_part_of_a_changed_file_is_removed_even_if_the_new_download_breaks_off(site, tmp_path):
    break_off(site)
    (old,) = tmp_path.rglob("*.part")
    site.content, site.headers = CONTENT[::-1], {"ETag": '"two"'}
    site.drops = [0, 500, 0, 0, 0]
    refused(site.url)
    (new,) = tmp_path.rglob("*.part")
    assert new != old and new.read_bytes() == CONTENT[::-1][:500]
    assert fetch(site.url).read_bytes() == CONTENT[::-1]
    assert site.log[-1] == ("bytes=499-", 206, len(CONTENT) - 499)


def test_a_file_that_shrank_meanwhile_is_downloaded_anew(site):
    break_off(site)
    site.content = b"short"
    assert fetch(site.url).read_bytes() == b"short"
    assert site.log == [("bytes=999-", 416, 0), (None, 200, 5)]


@pytest.mark.parametrize("change", [{"range_shift": 1}, {"content": CONTENT[5000:7000]}])
def test_another_range_than_the_missing_one_is_not_used(site, change):
    break_off(site)
    vars(site).update(change)
    assert fetch(site.url).read_bytes() == site.content
    assert [asked for asked, _, _ in site.log] == ["bytes=999-", None]


@pytest.mark.parametrize(
    "headers, asked",
    [
        ({}, None),
        ({"ETag": 'W/"weak"'}, None),
        ({"Last-Modified": "Tue, 04 May 2021 10:00:00 GMT"}, "bytes=999-"),
        ({"ETag": 'W/"weak"', "Last-Modified": "Tue, 04 May 2021 10:00:00 GMT"}, "bytes=999-"),
        ({"ETag": f'"{"long" * 1000}"'}, "bytes=999-"),
    ],
)
def test_a_download_continues_only_if_a_change_of_the_file_would_show(site, headers, asked):
    site.headers = headers
    break_off(site)
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log[0][0] == asked


def test_of_a_complete_part_only_the_last_byte_is_downloaded_again(site, tmp_path):
    site.hashes = [f"md5={SENT_MD5}"]
    break_off(site)
    wait_for_part(tmp_path, 1000).write_bytes(CONTENT)
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log == [(f"bytes={len(CONTENT) - 1}-", 206, 1)]


def test_a_part_that_is_too_long_is_downloaded_anew(site, tmp_path):
    break_off(site)
    wait_for_part(tmp_path, 1000).write_bytes(CONTENT + b"more")
    assert fetch(site.url).read_bytes() == CONTENT
    assert [status for _, status, _ in site.log] == [416, 200]


def test_of_two_processes_one_downloads_and_the_other_waits(site, tmp_path):
    site.hold, site.drops = threading.Event(), [1_000_000]
    with start(site.url) as first:
        wait_for_part(tmp_path, 1)
        with start(site.url) as second:
            assert "waiting for another process" in second.stderr.readline()
            site.hold.set()
            outputs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert outputs == [f"{cache_file(site.url)}\n"] * 2
    assert cache_file(site.url).read_bytes() == CONTENT
    assert len(site.log) == 1


def test_after_kill_9_a_waiting_process_downloads_only_the_rest(site, tmp_path):
    site.hold, site.drops = threading.Event(), [1_000_000]
    with start(site.url) as first:
        part = wait_for_part(tmp_path, 500_000)
        with start(site.url) as second:
            assert "waiting for another process" in second.stderr.readline()
            first.send_signal(signal.SIGKILL)
            output, errors = second.communicate(timeout=30)
    assert first.returncode == -signal.SIGKILL
    assert Path(output.strip()).read_bytes() == CONTENT, errors
    (_, _, killed), (asked, status, rest) = site.log
    first_byte = len(CONTENT) - rest
    assert 500_000 <= first_byte + 1 <= killed
    assert (asked, status) == (f"bytes={first_byte}-", 206)
    assert not part.exists()
