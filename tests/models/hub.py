"""A model hub on loopback that speaks as much of the hub's API as loading a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(address, files asked for) of a server of `repositories`, folders by "organisation/name"."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path.startswith("api/models/"):
                return self.describe(path.removeprefix("api/models/"))
            repository, found, rest = path.partition("/resolve/")
            file = repositories.get(repository, Path("/nowhere")) / rest.partition("/")[2]
            if not found or not file.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = file.read_bytes()
            if body:
                asked.append(f"{repository}/{file.name}")
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.send(200, content, headers, body=body)

        def describe(self, path: str) -> None:
            repository = "/".join(path.split("/")[:2])
            if repository not in repositories:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            folder = repositories[repository]
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            if "/tree/" in path:
                content: object = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40}
                    for name in files
                ]
            else:
                content = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
