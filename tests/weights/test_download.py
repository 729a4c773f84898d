"""Downloads from a real server that misbehaves on demand, in real processes that are killed."""

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
from mlpmixer_flax.weights.download import cache_dir, cache_file, fetch

CONTENT = np.random.default_rng(0).bytes(3 * 2**20 + 12345)
SIZE_MIB = 3.01
MD5 = hashlib.md5(CONTENT)
SENT_MD5 = base64.b64encode(MD5.digest()).decode()  # as in x-goog-hash
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FETCH = "import sys; from mlpmixer_flax.weights.download import fetch; print(fetch(sys.argv[1]))"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.site`; its fields say how."""

    def do_GET(self):
        site = self.server.site
        site.paths.append(self.path)
        if self.path in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[self.path])
            self.end_headers()
            return
        asked = self.headers["Range"]
        start, status = 0, site.statuses.pop(0) if site.statuses else 200
        if asked and site.ranges and status == 200:
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
        with contextlib.suppress(OSError):  # the client may have closed the connection, or be dead
            self.end_headers()
            self.wfile.write(sent)
            if site.hold and sent != body:
                site.hold.wait(30)
                self.wfile.write(body[len(sent) :])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server that has the same file at every path, an empty cache, and short pauses between tries."""
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
        range_shift=0,
        length=True,
        extra_length=0,
        drops=[],  # number of bytes after which the connection is closed, request by request
        hold=None,  # an event: wait for it instead of closing the connection
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
    """Returns the one sentence that `fetch` raises."""
    with pytest.raises(UserError) as raised:
        fetch(url, **kwargs)
    message = str(raised.value)
    assert "\n" not in message and ": " in message, message
    return message


def break_off(site, sent=1000):
    """Starts a download that ends with its first `sent` bytes in the cache."""
    site.drops = [sent, 0, 0, 0]
    assert "run the command again to continue" in refused(site.url)
    site.log.clear()


def start(url):
    command = [sys.executable, "-c", FETCH, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_part(tmp_path, size):
    """Returns the partial file as soon as it has `size` bytes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for part in tmp_path.rglob("*.part"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.01)
    raise AssertionError(f"no partial file of {size} bytes")


# The cache


def test_a_file_arrives_under_its_name_and_nothing_else_stays(site, tmp_path):
    assert not cache_file(site.url).exists()
    file = fetch(site.url, size_mib=SIZE_MIB)
    assert file == cache_file(site.url)
    assert file.read_bytes() == CONTENT
    assert file.parent.parent == cache_dir() == tmp_path / "cache"
    assert files(tmp_path) == ["Mixer-B_16.npz"]
    assert site.log == [(None, 200, len(CONTENT))]


def test_with_the_file_in_the_cache_the_network_is_not_touched(site):
    file = fetch(site.url)
    site.close()
    lock = file.with_name(f"{file.name}.lock")
    lock.unlink()
    assert fetch(site.url) == file
    assert not lock.exists()  # so a read-only cache works, too


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
    with pytest.raises(
        UserError, match="no home directory found for ~no.such.user/cache: set MLPMIXER_CACHE"
    ):
        cache_dir()


# Interruptions


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


# Several processes


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


# Checks


@pytest.mark.parametrize("forms", [["md5={}"], ["crc32c=n03x6A==,md5={}"], ["crc32c=n03x6A==", "md5={}"]])
def test_the_servers_md5_is_checked(site, tmp_path, forms):
    wrong = hashlib.md5(b"other")
    site.hashes = [form.format(base64.b64encode(wrong.digest()).decode()) for form in forms]
    message = refused(site.url)
    assert f"md5 {MD5.hexdigest()} instead of {wrong.hexdigest()}" in message
    assert files(tmp_path) == []
    site.hashes = [form.format(SENT_MD5) for form in forms]
    assert fetch(site.url).read_bytes() == CONTENT


def test_the_md5_covers_the_bytes_of_the_first_connection_too(site, tmp_path):
    site.hashes = [f"md5={SENT_MD5}"]
    break_off(site)
    wait_for_part(tmp_path, 1000).write_bytes(CONTENT[1:1001])  # as damaged on the disk
    assert MD5.hexdigest() in refused(site.url)
    assert site.log == [("bytes=999-", 206, len(CONTENT) - 999)]
    assert files(tmp_path) == []


@pytest.mark.parametrize("later", [[], ["md5=AAAAAAAAAAAAAAAAAAAAAA=="]])
def test_a_part_is_never_completed_without_the_md5_that_came_with_its_first_bytes(site, tmp_path, later):
    site.hashes = [f"md5={SENT_MD5}"]
    break_off(site)
    wait_for_part(tmp_path, 1000).write_bytes(CONTENT[1:1001])
    site.hashes = later
    if later:
        assert MD5.hexdigest() in refused(site.url)
    else:
        assert fetch(site.url).read_bytes() == CONTENT
    assert site.log[1:] == [(None, 200, len(CONTENT))]


@pytest.mark.parametrize("pin", [SHA256, SHA256.upper()])
def test_a_pinned_hash_is_checked_and_not_sent(site, pin):
    assert fetch(f"{site.url}#sha256={pin}") == cache_file(f"{site.url}#sha256={SHA256}")
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
    assert ("downloading" in capsys.readouterr().err) == (not length)  # an announced size is checked first


def test_without_a_content_length_the_published_size_is_enough(site):
    site.length = False
    assert fetch(site.url, size_mib=SIZE_MIB).read_bytes() == CONTENT


def test_an_error_page_is_not_taken_for_weights(site):
    site.content = b"<html>Sign in to the network</html>"
    assert "35 bytes, not the 228.47 MiB" in refused(site.url, size_mib=228.47)


def test_a_content_length_that_is_not_kept_is_an_interruption(site):
    site.extra_length = 10
    assert "broke off" in refused(site.url)
    assert not cache_file(site.url).exists()


# Mistakes of a user


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
    with pytest.raises(UserError, match="path of a file you have|give a hash as #sha256="):
        cache_file(url)


@pytest.mark.parametrize("status", [403, 404, 503, 204])
def test_an_error_of_the_server_is_reported_at_once(site, status):
    site.statuses = [status]
    message = refused(site.url)
    assert site.url in message and f"HTTP {status}" in message
    assert message.endswith(": check the address and the network")
    assert len(site.log) == 1


def test_an_unreachable_server_is_reported_at_once(site, monkeypatch, tmp_path):
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
        assert url in message and message.endswith(": check the address and the network")
    assert files(tmp_path) == []


def test_redirects_are_followed_also_when_resuming(site):
    site.redirects = {"/latest.npz": f"http://localhost:{site.port}/stored/elsewhere"}
    site.drops = [1000]
    file = fetch(f"http://127.0.0.1:{site.port}/latest.npz")
    assert file.name == "latest.npz"
    assert file.read_bytes() == CONTENT
    assert site.log == [(None, 200, 1000), ("bytes=999-", 206, len(CONTENT) - 999)]


@pytest.mark.parametrize("to", ["/again.npz", "file:///etc/passwd", "ftp://127.0.0.1:9/x"])
def test_a_redirect_to_itself_or_out_of_http_is_refused(site, to):
    site.redirects = {"/again.npz": to}
    assert "cannot be downloaded" in refused(f"http://127.0.0.1:{site.port}/again.npz")


def test_a_cache_that_cannot_be_written_is_reported(site, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "file" / "cache"))
    message = refused(site.url)
    assert str(tmp_path / "file" / "cache") in message and "MLPMIXER_CACHE" in message
    assert site.log == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported(site, tmp_path):
    break_off(site)
    part = wait_for_part(tmp_path, 1000)
    part.unlink()
    part.symlink_to("/dev/full")
    message = refused(site.url)
    assert "No space left" in message and "MLPMIXER_CACHE" in message
    assert not cache_file(site.url).exists()


# Progress


def test_a_terminal_shows_a_progress_bar(site):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    command = [sys.executable, "-c", FETCH, site.url]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=30)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(stderr)
    assert done.stdout == f"{cache_file(site.url)}\n"
    assert "Mixer-B_16.npz: 100%" in shown and "3.01M/3.01M" in shown
    assert "downloading" not in shown
