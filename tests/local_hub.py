"""A Hub on this machine: enough of its HTTP interface to create repositories, push to them and load from them."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class LocalHub(ThreadingHTTPServer):
    """Attributes: files, repository -> path -> content; objects, the large ones by SHA-256; requests, their lines."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub that listens on a free port until the block ends."""
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *args):
        pass

    def _answer(self, body: bytes | dict | list = b"", status: int = 200, **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _respond(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, body, *match.groups())
        self._answer({"error": "not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def create(self, body):
        repository = json.loads(body)
        name = f"{repository['organization'] or 'someone'}/{repository['name']}"
        self.server.files.setdefault(name, {})
        self._answer({"url": f"{self.server.url}/{name}"})

    def validate(self, body):
        self._answer({"errors": [], "warnings": []})

    def preupload(self, body, _):
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [file["path"] for file in json.loads(body)["files"]]
        self._answer({"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in files]})

    def large_files(self, body, _):
        def action(file: dict) -> dict:
            return {**file, "actions": {"upload": {"href": f"{self.server.url}/objects/{file['oid']}"}}}

        self._answer({"transfer": "basic", "objects": [action(file) for file in json.loads(body)["objects"]]})

    def put_object(self, body, digest):
        assert hashlib.sha256(body).hexdigest() == digest
        self.server.objects[digest] = body
        self._answer()

    def commit(self, body, repository):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[repository][value["path"]] = self.server.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.server.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

    def info(self, _, repository):
        if repository not in self.server.files:
            return self._answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in self.server.files[repository]]
        self._answer({"id": repository, "sha": COMMIT, "siblings": siblings})

    def tree(self, _, repository):
        files = self.server.files.get(repository, {})
        self._answer([{"type": "file", "path": p, "size": len(c), "oid": _digest(c)} for p, c in files.items()])

    def file(self, _, repository, path):
        content = self.server.files.get(repository, {}).get(path)
        if content is None:
            return self._answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        self._answer(content, X_Repo_Commit=COMMIT, ETag=f'"{_digest(content)}"')


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/main", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.large_files),
    (r"PUT /objects/(\w+)", _Handler.put_object),
    (rf"POST /api/models/{_NAME}/commit/main", _Handler.commit),
    (rf"GET /api/models/{_NAME}(?:/revision/main)?", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/\w+.*", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/\w+/(.+)", _Handler.file),
]
