"""Downloads from a real server: the cache, checks, mistakes of a user and the progress bar."""

import base64
import hashlib
import os
import pty
import socket
import subprocess
import sys
import termios

import pytest
from download_site import (
    CONTENT,
    FETCH,
    MD5,
    SENT_MD5,
    SHA256,
    SIZE_MIB,
    break_off,
    files,
    refused,
    wait_for_part,
)

from mlpmixer_flax import UserError
from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.download import cache_dir, cache_file, fetch

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
