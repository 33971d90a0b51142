"""A Hugging Face Hub of one process on the loopback interface: what uploading and downloading small files needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class FakeHub:
    """The server, as a context manager.

    Attributes:
        address: for HF_ENDPOINT.
        files: content by (repository, path).
        private: by repository.
        requests: (method, path, token) of every request.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                path, body = self.noted(), self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    hub.private[name] = asked.get("private") or asked.get("visibility") == "private"
                    self.answer({"url": f"{hub.address}/{name}", "id": name})
                elif path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    paths = [file["path"] for file in json.loads(body)["files"]]
                    mode = {"uploadMode": "regular", "shouldIgnore": False}
                    self.answer({"files": [{"path": path, **mode} for path in paths]})
                elif "/commit/" in path:
                    name = path.removeprefix("/api/models/").partition("/commit/")[0]
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "file":
                            assert line["value"]["encoding"] == "base64"
                            content = base64.b64decode(line["value"]["content"])
                            hub.files[name, line["value"]["path"]] = content
                    address = f"{hub.address}/{name}/commit/{COMMIT}"
                    self.answer({"success": True, "commitUrl": address, "commitOid": COMMIT})
                else:
                    self.answer({"error": f"no {path}"}, 404)

            def do_GET(self, body=True):
                path = self.noted()
                if path.startswith("/api/models/"):  # asked by clients of 2025
                    name = path.removeprefix("/api/models/").partition("/revision/")[0]
                    self.answer({"id": name, "modelId": name, "sha": COMMIT, "xetEnabled": False})
                    return
                name, _, rest = path[1:].partition("/resolve/")
                content = hub.files.get((name, unquote(rest.partition("/")[2])))
                if content is None:
                    self.answer({"error": f"no {path}"}, 404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def do_HEAD(self):
                self.do_GET(body=False)

            def noted(self) -> str:
                path = urlsplit(self.path).path
                hub.requests.append((self.command, path, self.headers.get("Authorization")))
                return path

            def answer(self, values, status=200):
                content = json.dumps(values).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
