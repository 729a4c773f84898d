"""A server that takes and gives models as the Hugging Face hub does: python tests/hub_server.py FOLDER

Prints its address. A model lies in FOLDER/OWNER/NAME, and FOLDER/requests.txt lists all requests that change something.
It speaks what huggingface_hub needs for create_repo, file_exists, upload_folder and hf_hub_download, without Xet. Only
the token "may-write" may write, and only for the owner "someone".
"""

import base64
import hashlib
import http.server
import json
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
COMMIT = "a" * 40
OBJECTS: dict[str, bytes] = {}  # sha256 -> content, of files uploaded by LFS


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        if self.path.startswith("/api/"):  # about a model that the client could not create
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        owner, name, _, _, file = self.path.lstrip("/").split("/", 4)  # OWNER/NAME/resolve/REVISION/FILE
        model = ROOT / owner / name
        if not model.is_dir():
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": COMMIT}
        if not (model / file).is_file():
            return self.answer(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        content = (model / file).read_bytes()
        return self.answer(200, content, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    do_GET = do_HEAD

    def do_PUT(self):
        content = self.content()
        OBJECTS[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def do_POST(self):
        address, path, content = f"http://{self.headers['Host']}", self.path, self.content()
        with (ROOT / "requests.txt").open("a") as file:
            file.write(f"{path}\n")
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if self.headers["Authorization"] != "Bearer may-write":
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            asked = json.loads(content)
            if asked["organization"] != "someone":
                return self.answer(403, b'{"error": "You do not have the rights."}')
            model = ROOT / asked["organization"] / asked["name"]
            url = f"{address}/{asked['organization']}/{asked['name']}"
            if model.is_dir():
                return self.reply({"url": url, "error": "You already created this model repo"}, 409)
            model.mkdir(parents=True)
            return self.reply({"url": url})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            for wanted in objects:
                wanted["actions"] = {"upload": {"href": f"{address}/objects/{wanted['oid']}"}}
            return self.reply({"transfer": "basic", "objects": objects})
        _, _, _, owner, name, action, _ = path.split("/")  # /api/models/OWNER/NAME/ACTION/REVISION
        if action == "preupload":
            return self.reply({"files": [mode(file["path"]) for file in json.loads(content)["files"]]})
        assert action == "commit", path
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                (ROOT / owner / name / value["path"]).write_bytes(base64.b64decode(value["content"]))
            if line["key"] == "lfsFile":
                (ROOT / owner / name / value["path"]).write_bytes(OBJECTS[value["oid"]])
        url = f"{address}/{owner}/{name}/commit/{COMMIT}"
        return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def content(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, content, status=200):
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content=b"", headers=None):
        self.send_response(status)
        for header, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def mode(path):
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
        "shouldIgnore": False,
    }


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
