"""Downloads against a real server that misbehaves on demand, by real processes that are killed."""

import base64
import contextlib
import hashlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.download import cache_dir, cached, fetch

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 12345)
SIZE_MIB = 3.01
MD5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FETCH = "import sys; from mlpmixer_flax.weights.download import fetch; print(fetch(sys.argv[1]))"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.site`, whose fields are the switches."""

    def do_GET(self):
        site = self.server.site
        site.paths.append(self.path)
        if self.path in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[self.path])
            self.end_headers()
            return
        asked = self.headers["Range"]
        known = not site.if_range or self.headers["If-Range"] in site.headers.values()
        start, status = 0, site.statuses.pop(0) if site.statuses else 200
        if asked and known and site.ranges and status == 200:
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
        if start and start >= len(site.content):
            start, status = len(site.content), 416
        body = site.content[start:]
        self.send_response(status)
        for name, value in [*site.headers.items(), *(("x-goog-hash", value) for value in site.hashes)]:
            self.send_header(name, value)
        if status == 206:
            span = f"{start + site.range_shift}-{len(site.content) - 1}/{len(site.content)}"
            self.send_header("Content-Range", f"bytes {span}")
        if site.length:
            self.send_header("Content-Length", len(body) + site.extra_length)
        sent = body[: site.drops.pop(0)] if site.drops else body
        site.log.append((asked, status, len(sent)))
        with contextlib.suppress(OSError):  # whoever asked may have heard enough, or be dead
            self.end_headers()
            self.wfile.write(sent)
            if site.hold and sent != body:
                site.hold.wait(30)
                self.wfile.write(body[len(sent) :])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server that has the same file at every path, an empty cache, and a short patience."""
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES_SECONDS", (0.01, 0.01, 0.01))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.site = SimpleNamespace(
        port=server.server_port,
        url=f"http://127.0.0.1:{server.server_port}/weights/Mixer-B_16.npz",
        content=CONTENT,
        statuses=[],  # instead of 200, request by request
        headers={"ETag": '"one"'},
        hashes=[],  # values of x-goog-hash
        ranges=True,
        if_range=True,
        range_shift=0,
        length=True,
        extra_length=0,
        drops=[],  # bytes after which the connection is closed, request by request
        hold=None,  # an event to wait for instead of closing it
        redirects={},
        paths=[],
        log=[],  # (Range, status, bytes sent)
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def close():
        server.shutdown()
        server.server_close()

    server.site.close = close
    yield server.site
    if server.site.hold:
        server.site.hold.set()
    close()
    thread.join()


def files(tmp_path):
    return sorted(file.name for file in tmp_path.rglob("*.*") if file.suffix != ".lock")


def refused(url, **kwargs):
    """The one sentence that `fetch` raises."""
    with pytest.raises(UserError) as raised:
        fetch(url, **kwargs)
    message = str(raised.value)
    assert "\n" not in message and ": " in message, message
    return message


def break_off(site, sent=1000):
    """A download that ends with its first `sent` bytes in the cache."""
    site.drops = [sent, 0, 0, 0]
    assert "run the command again to continue" in refused(site.url)
    site.log.clear()


def start(url):
    command = [sys.executable, "-c", FETCH, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_part(tmp_path, size):
    """The partial file, once it has so many bytes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for part in tmp_path.rglob("*.part"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.01)
    raise AssertionError(f"no partial file of {size} bytes")


# The cache


def test_a_file_arrives_under_its_name_and_nothing_else_stays(site, tmp_path):
    assert cached(site.url) is None
    file = fetch(site.url, size_mib=SIZE_MIB)
    assert file.read_bytes() == CONTENT
    assert file.parent.parent == cache_dir() == tmp_path / "cache"
    assert files(tmp_path) == ["Mixer-B_16.npz"]
    assert site.log == [(None, 200, len(CONTENT))]


def test_with_the_file_in_the_cache_the_network_is_not_touched(site):
    file = fetch(site.url)
    site.close()
    lock = file.with_name(f"{file.name}.lock")
    lock.unlink()
    assert fetch(site.url) == cached(site.url) == file
    assert not lock.exists()  # a cache that may only be read serves, too


def test_urls_of_the_same_name_do_not_share_a_file(site):
    first = fetch(site.url)
    site.content = b"other"
    assert fetch(site.url.replace("weights", "sam")).read_bytes() == b"other"
    assert fetch(site.url + "?version=2").read_bytes() == b"other"
    assert first.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "path, name",
    [
        ("model.safetensors?download=true&to=/etc/passwd", "model.safetensors"),
        ("", "download"),
        ("..", "download"),
        ("a/../../..", "download"),
        ("%2e%2e", "download"),
        ("..%2F..%2Fetc%2Fpasswd", "_.._etc_passwd"),
        ("..%5C..%5Cboot.ini", "_.._boot.ini"),
        ("a%00b%0Ac.npz", "a_b_c.npz"),
        (".bashrc", "bashrc"),
        ("Mixer%20B%C3%A9.npz", "Mixer_B_.npz"),
        ("x" * 2000 + ".npz", "x" * 96 + ".npz"),
    ],
)
def test_no_url_leads_out_of_the_cache(site, tmp_path, path, name):
    site.content = b"weights"
    file = fetch(f"http://127.0.0.1:{site.port}/{path}")
    assert file.name == name
    assert file.resolve().parent.parent == tmp_path / "cache"
    assert file.read_bytes() == b"weights"


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("MLPMIXER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == tmp_path / ".cache" / "mlpmixer-flax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mlpmixer-flax"
    monkeypatch.setenv("MLPMIXER_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("MLPMIXER_CACHE", "~no.such.user/cache")
    with pytest.raises(UserError, match="~no.such.user/cache leads to no home directory"):
        cache_dir()


# Interruptions


def test_a_dropped_connection_is_taken_up_where_it_stopped(site, tmp_path, capsys):
    site.drops = [1_000_000, 500_000]
    assert fetch(site.url).read_bytes() == CONTENT
    rest = len(CONTENT) - 1_500_000
    assert site.log == [
        (None, 200, 1_000_000),
        ("bytes=1000000-", 206, 500_000),
        ("bytes=1500000-", 206, rest),
    ]
    assert files(tmp_path) == ["Mixer-B_16.npz"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"downloading {site.url} (3.01 MiB) to {cached(site.url)}"


def test_a_connection_that_stalls_counts_as_dropped(site, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    site.hold, site.drops = threading.Event(), [1000]
    assert fetch(site.url).read_bytes() == CONTENT
    assert [asked for asked, _, _ in site.log] == [None, "bytes=1000-"]


def test_after_a_few_tries_it_gives_up_and_the_next_run_continues(site):
    site.drops = [1000, 1000, 1000, 1000]
    message = refused(site.url)
    assert f"4,000 of {len(CONTENT):,} bytes" in message and site.url in message
    assert cached(site.url) is None
    assert len(site.log) == 4
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log[4:] == [("bytes=4000-", 206, len(CONTENT) - 4000)]


def test_a_failing_server_is_tried_again_once_the_download_has_begun(site):
    site.drops, site.statuses = [1000], [200, 503]
    assert fetch(site.url).read_bytes() == CONTENT
    assert [status for _, status, _ in site.log] == [200, 503, 206]


def test_a_server_that_ignores_ranges_makes_it_start_over(site):
    site.ranges, site.drops = False, [1000]
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log == [(None, 200, 1000), ("bytes=1000-", 200, len(CONTENT))]


@pytest.mark.parametrize("if_range", [True, False])  # False: a server that doesn't know If-Range
def test_a_file_that_changed_meanwhile_is_fetched_anew(site, if_range):
    break_off(site)
    site.content, site.headers, site.if_range = CONTENT[::-1], {"ETag": '"two"'}, if_range
    assert fetch(site.url).read_bytes() == CONTENT[::-1]
    assert site.log[0][:2] == ("bytes=1000-", 200 if if_range else 206)


def test_a_file_that_shrank_meanwhile_is_fetched_anew(site):
    break_off(site)
    site.content = b"short"
    assert fetch(site.url).read_bytes() == b"short"
    assert site.log == [("bytes=1000-", 416, 0), (None, 200, 5)]


@pytest.mark.parametrize("change", [{"range_shift": 1}, {"content": CONTENT[5000:7000]}])
def test_another_range_than_the_missing_one_is_not_used(site, change):
    break_off(site)
    vars(site).update(change)
    assert fetch(site.url).read_bytes() == site.content
    assert [asked for asked, _, _ in site.log] == ["bytes=1000-", None]


@pytest.mark.parametrize(
    "headers, asked",
    [
        ({}, None),
        ({"ETag": 'W/"weak"'}, None),
        ({"Last-Modified": "Tue, 04 May 2021 10:00:00 GMT"}, "bytes=1000-"),
        ({"ETag": 'W/"weak"', "Last-Modified": "Tue, 04 May 2021 10:00:00 GMT"}, "bytes=1000-"),
    ],
)
def test_it_continues_only_what_it_can_tell_unchanged(site, headers, asked):
    site.headers = headers
    break_off(site)
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log[0][0] == asked


def test_a_finished_part_is_checked_without_asking_for_more(site, tmp_path):
    site.hashes = [f"md5={MD5}"]
    break_off(site)
    site.close()
    wait_for_part(tmp_path, 1000).write_bytes(CONTENT)
    assert fetch(site.url).read_bytes() == CONTENT


def test_a_damaged_note_about_the_part_makes_it_start_over(site, tmp_path):
    break_off(site)
    next(tmp_path.rglob("*.promise")).write_text('{"size_by')
    assert fetch(site.url).read_bytes() == CONTENT
    assert site.log == [(None, 200, len(CONTENT))]


# Several processes


def test_of_two_processes_one_downloads_and_the_other_waits(site, tmp_path):
    site.hold, site.drops = threading.Event(), [1_000_000]
    with start(site.url) as first:
        wait_for_part(tmp_path, 1)
        with start(site.url) as second:
            assert "waiting for another process" in second.stderr.readline()
            site.hold.set()
            outputs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert outputs == [f"{cached(site.url)}\n"] * 2
    assert cached(site.url).read_bytes() == CONTENT
    assert len(site.log) == 1


def test_after_kill_9_a_waiting_process_fetches_only_what_is_missing(site, tmp_path):
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
    done = len(CONTENT) - rest
    assert 500_000 <= done <= killed
    assert (asked, status) == (f"bytes={done}-", 206)
    assert not part.exists()


# Checks


@pytest.mark.parametrize("forms", [["md5={}"], ["crc32c=n03x6A==,md5={}"], ["crc32c=n03x6A==", "md5={}"]])
def test_the_servers_md5_is_checked(site, tmp_path, forms):
    wrong = base64.b64encode(bytes(16)).decode()
    site.hashes = [form.format(wrong) for form in forms]
    message = refused(site.url)
    assert wrong in message and MD5 in message
    assert files(tmp_path) == []
    site.hashes = [form.format(MD5) for form in forms]
    assert fetch(site.url).read_bytes() == CONTENT


def test_the_md5_sent_with_the_first_bytes_holds_for_the_last(site, tmp_path):
    site.hashes = ["md5=AAAAAAAAAAAAAAAAAAAAAA=="]
    break_off(site)
    site.hashes = []
    assert MD5 in refused(site.url)
    assert files(tmp_path) == []


@pytest.mark.parametrize("pin", [SHA256, SHA256.upper()])
def test_a_pinned_hash_is_checked_and_not_sent(site, pin):
    assert fetch(f"{site.url}#sha256={pin}") == cached(f"{site.url}#sha256={SHA256}")
    assert site.paths == ["/weights/Mixer-B_16.npz"]


def test_a_file_of_another_hash_than_pinned_is_refused_even_with_the_url_cached(site, tmp_path):
    file = fetch(site.url)
    message = refused(f"{site.url}#sha256={'0' * 64}")
    assert SHA256 in message and "0" * 64 in message
    assert files(tmp_path) == [file.name]


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("size_mib", [2.99, 3.03, 228.47])
def test_a_file_of_another_size_than_published_is_refused(site, tmp_path, capsys, length, size_mib):
    site.length = length
    message = refused(site.url, size_mib=size_mib)
    assert f"{len(CONTENT):,} bytes" in message and str(size_mib) in message
    assert files(tmp_path) == []
    assert ("downloading" in capsys.readouterr().err) == (not length)  # announced sizes are checked first


def test_without_a_content_length_the_published_size_is_enough(site):
    site.length = False
    assert fetch(site.url, size_mib=SIZE_MIB).read_bytes() == CONTENT


def test_an_error_page_is_not_taken_for_weights(site):
    site.content = b"<html>Sign in to the network</html>"
    assert "35 bytes, not the 228.47 MiB" in refused(site.url, size_mib=228.47)


def test_a_content_length_that_is_not_kept_is_an_interruption(site):
    site.extra_length = 10
    assert "broke off" in refused(site.url)
    assert cached(site.url) is None


# What a user can get wrong


@pytest.mark.parametrize(
    "url",
    [
        "",
        "weights.npz",
        "file:///etc/passwd",
        "ftp://example.org/weights.npz",
        "gs://mixer_models/imagenet1k/Mixer-B_16.npz",
        "http://",
        "http://example.org/with space.npz",
        "http://example.org/newline\r\nX-Header: 1",
        "http://example.org/é.npz",
        "http://example.org/weights.npz#sha256=abc",
        "http://example.org/weights.npz#md5=" + "0" * 32,
        "http://example.org/weights.npz#sha256=\n" + "0" * 64,
    ],
)
def test_other_urls_are_refused(url):
    assert repr(url) in refused(url)
    with pytest.raises(UserError, match="path of a file you have|pinned by #sha256="):
        cached(url)


@pytest.mark.parametrize("status", [403, 404, 503, 204])
def test_an_error_of_the_server_is_said_at_once(site, status):
    site.statuses = [status]
    message = refused(site.url)
    assert site.url in message and f"HTTP {status}" in message and "pass its path" in message
    assert len(site.log) == 1


def test_an_unreachable_server_is_said_at_once(site, monkeypatch, tmp_path):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        refusal = f"http://127.0.0.1:{port}/weights.npz"
        assert "refused" in refused(refusal)
        silent.listen()
        assert "timed out" in refused(refusal)
    assert "SSL" in refused(site.url.replace("http:", "https:"))
    for url in ("http://nowhere.invalid/weights.npz", "http://[bad/x", "http://host:port/x", "http://../x"):
        message = refused(url)
        assert url in message and "pass its path" in message
    assert files(tmp_path) == []


def test_redirects_are_followed_also_when_resuming(site):
    site.redirects = {"/latest.npz": f"http://localhost:{site.port}/stored/elsewhere"}
    site.drops = [1000]
    file = fetch(f"http://127.0.0.1:{site.port}/latest.npz")
    assert file.name == "latest.npz"
    assert file.read_bytes() == CONTENT
    assert site.log == [(None, 200, 1000), ("bytes=1000-", 206, len(CONTENT) - 1000)]


@pytest.mark.parametrize("to", ["/again.npz", "file:///etc/passwd", "ftp://127.0.0.1:9/x"])
def test_a_redirect_to_nowhere_is_refused(site, to):
    site.redirects = {"/again.npz": to}
    assert "cannot be downloaded" in refused(f"http://127.0.0.1:{site.port}/again.npz")


def test_a_cache_that_cannot_be_written_is_said(site, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "file" / "cache"))
    message = refused(site.url)
    assert str(tmp_path / "file" / "cache") in message and "MLPMIXER_CACHE" in message
    assert site.log == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said(site, tmp_path):
    break_off(site)
    part = wait_for_part(tmp_path, 1000)
    part.unlink()
    part.symlink_to("/dev/full")
    message = refused(site.url)
    assert "No space left" in message and "MLPMIXER_CACHE" in message
    assert cached(site.url) is None


# What it shows


def test_a_terminal_shows_a_progress_bar(site):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    command = [sys.executable, "-c", FETCH, site.url]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=30)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(stderr)
    assert done.stdout == f"{cached(site.url)}\n"
    assert "Mixer-B_16.npz: 100%" in shown and "3.01M/3.01M" in shown
    assert "downloading" not in shown
