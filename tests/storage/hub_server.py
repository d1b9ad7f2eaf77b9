"""The part of the Hugging Face hub's interface that reads and writes the files of one repository, in RAM."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "owner/name"
API = f"/api/models/{REPOSITORY}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code="EntryNotFound"):
        self.answer({"error": code}, 404, **{"X-Error-Code": code})

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def entries(self, folder=""):
        """All files and folders below a folder."""
        files = self.server.files
        folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
        listed = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
        listed += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        return [each for each in listed if not folder or each["path"].startswith(f"{folder}/")]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path in (API, f"{API}/revision/main"):
            self.answer({"id": REPOSITORY, "sha": "0" * 40, "siblings": [], "tags": [], "private": False})
        elif path.startswith(f"{API}/tree/main"):
            entries = self.entries(path.removeprefix(f"{API}/tree/main").strip("/"))
            self.answer(entries) if entries else self.missing()
        elif path.startswith(f"/{REPOSITORY}/resolve/main/"):
            content = self.server.files.get(path.removeprefix(f"/{REPOSITORY}/resolve/main/"))
            if content is None:
                self.missing()
                return
            start, _, stop = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
            piece = content[int(start) : int(stop) + 1 if stop else None]
            self.answer(piece, 206, ETag=hashlib.sha1(content).hexdigest())
        else:
            self.missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == f"{API}/paths-info/main":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.answer([each for each in self.entries() if each["path"] in paths])
        elif path == f"{API}/preupload/main":
            files = [each["path"] for each in json.loads(body)["files"]]
            self.answer({"files": [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in files]})
        elif path == f"{API}/commit/main":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    self.server.commits.append(entry["value"]["path"])
            url = f"http://127.0.0.1/{REPOSITORY}/commit/{'0' * 40}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self.missing("RepoNotFound")


@contextmanager
def hub_server():
    """Yield the server; `files` are those of the repository, `commits` their paths in the order of their writing."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.block_on_close = False
    server.files, server.commits = {".gitattributes": b"x"}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()
