"""Weights from the Hugging Face hub: the real client, with a local server that answers like the hub."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mlpmixer_flax import UserError
from mlpmixer_flax.weights import hub

pytest.importorskip("huggingface_hub")

GOLDEN = Path(__file__).parent.parent / "golden"
CONFIG = {
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
    }
}
WEIGHTS = (GOLDEN / "timm_tiny.safetensors").read_bytes()
# Prints for each source what is known of the weights, or the error.
SHOW = """
import sys
from mlpmixer_flax import UserError, pretrained
for source in sys.argv[1:]:
    try:
        weights = pretrained.find(source)
    except UserError as error:
        print("error:", error)
    else:
        origin = weights.metadata
        pixels = map(origin["preprocess"].get, ("mean", "image_size_px", "crop_fraction"))
        print(len(weights.shapes), origin["model"]["gelu"], *pixels)
"""
KNOWN = "42 erf (0.1, 0.2, 0.3) 32 0.9"


class Hub:
    """A server with models, and a client whose cache is empty at first."""

    def __init__(self, cache):
        self.files = {}  # (OWNER/NAME, revision, file) -> content
        self.asked = []  # paths of requests
        self.down = False
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.asked.append(self.path)
                owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
                model, content = f"{owner}/{name}", hub.files.get((f"{owner}/{name}", revision, file))
                if content is not None:
                    status, headers = (
                        200,
                        {"ETag": f'"{revision}-{file}"', "X-Repo-Commit": hub.commit(revision)},
                    )
                elif not any(model == key[0] for key in hub.files):
                    status, headers = 401, {"X-Error-Code": "RepoNotFound"}
                elif not any((model, revision) == key[:2] for key in hub.files):
                    status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
                else:
                    status = 404
                    headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit(revision)}
                self.send_response(503 if hub.down else status)
                for header in {**headers, "Content-Length": len(content or b"")}.items():
                    self.send_header(*map(str, header))
                self.end_headers()
                return content or b""

            def do_GET(self):
                self.wfile.write(self.do_HEAD())

            def log_message(self, form, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    @staticmethod
    def commit(revision):
        return {"main": "a" * 40, "v1": "b" * 40}.get(revision, revision)

    def add(self, model="someone/mixer", revision="main", **files):
        contents = {"model.safetensors": WEIGHTS, "config.json": json.dumps(CONFIG).encode()}
        for file, content in {**contents, **{name.replace("__", "."): files[name] for name in files}}.items():
            if content is not None:
                self.files[model, revision, file] = content

    def show(self, *sources):
        """Returns a line for each source, from a process of its own."""
        command = [sys.executable, "-c", SHOW, *sources]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def site(tmp_path):
    site = Hub(tmp_path / "cache")
    yield site
    site.server.shutdown()
    site.server.server_close()


def test_models_and_revisions_are_read_with_their_config_and_then_without_the_network(site):
    site.add()
    other = {"pretrained_cfg": {**CONFIG["pretrained_cfg"], "mean": [0.9, 0.8, 0.7]}}
    site.add(revision="v1", config__json=json.dumps(other).encode())
    site.add(revision="c" * 40, config__json=json.dumps(other).encode())
    for _ in range(2):
        revisions = ["", "@main", "@v1", f"@{'c' * 40}"]
        lines = site.show(
            "hf_hub:someone/mixer", *(f"hf-hub:someone/mixer{revision}" for revision in revisions)
        )
        assert lines == [KNOWN] * 3 + [KNOWN.replace("(0.1, 0.2, 0.3)", "(0.9, 0.8, 0.7)")] * 2
        site.down, site.asked = True, []
    assert site.asked == []


def test_a_model_may_lack_config_json_and_googles_weights_keep_tanh_in_every_revision(site, tmp_path):
    arrays = load_file(GOLDEN / "timm_tiny.safetensors")
    save_file({f"timm_model.{name}": array for name, array in arrays.items()}, tmp_path / "w")
    site.add(
        "someone/wrapped", model__safetensors=(tmp_path / "w").read_bytes()
    )  # by transformers' TimmWrapper
    site.add("someone/bare", config__json=None)
    google = "timm/mixer_b16_224.goog_in21k"
    site.add(google, config__json=None)
    site.add(google, "v1", config__json=None)
    for _ in range(2):
        sources = ["someone/wrapped", "someone/bare", google, f"{google}@v1"]
        lines = site.show(*(f"hf-hub:{source}" for source in sources))
        assert lines == [KNOWN, "42 erf (0.5,) None None", *["42 tanh (0.5,) 224 0.875"] * 2]
        site.down = True  # the cache knows that there is no such file


def test_each_reason_why_there_is_no_model_has_its_own_sentence(site):
    site.add()
    site.add("someone/swapped", config__json=json.dumps({**CONFIG, "num_classes": 3}).encode())
    site.add("someone/pickles", model__safetensors=None, pytorch_model__bin=b"\x80\x02}.")
    sources = [
        "someone/swapped",
        "someone/mixer@v9",
        "someone/mixer@",
        "someone/pickles@main",
        "someone/pickles@main",
        "no/body",
    ]
    swapped, revision, no_revision, pickles, again, nobody = site.show(
        *(f"hf-hub:{source}" for source in sources)
    )
    assert "num_classes=3, but in the arrays" in swapped
    assert revision.startswith(
        "error: hf-hub:someone/mixer has no revision 'v9': give a branch, tag or commit"
    )
    assert "ends without a revision: give a branch, tag or commit, or leave out the @" in no_revision
    assert "hf-hub:someone/pickles@main has no model.safetensors: " in pickles and "never read" in pickles
    assert again == pickles  # from the cache
    assert "the Hugging Face hub has no model 'no/body' that you may read: check the name" in nobody


def test_a_download_that_fails_names_the_ways_without_one(site):
    site.add()
    site.environment["HF_HUB_OFFLINE"] = "1"  # without it, the client tries again for 25 seconds
    command = [sys.executable, "-m", "mlpmixer_flax.pretrained", "hf-hub:someone/mixer"]
    done = subprocess.run(command, capture_output=True, text=True, env=site.environment)
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("model.safetensors of hf-hub:someone/mixer cannot be downloaded (", "--config.init_from=PATH",
                 "--weights=PATH", f"{site.environment['HF_HOME']}/hub (HF_HUB_CACHE", "train from random weights"):  # fmt: skip
        assert part in message


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'needs huggingface_hub: run pip install "mlpmixer-flax\[hub\]"'):
        hub.get_file(hub.parse("hf-hub:someone/mixer@v1"), hub.CONFIG_FILE)
