"""A server of one file that misbehaves on demand, and downloads from it."""

import base64
import contextlib
import hashlib
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.download import fetch

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


@contextlib.contextmanager
def serve():
    """Serves CONTENT at every path; yields how it does so, to be changed."""
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
