"""A hub on this machine: as much of its interface as the client of `resolve` speaks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """`files` of org/name by path. `fail`: answers given first, by a part of the request's path."""

    files: dict[str, bytes]
    fail: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    always: bool = False  # whether answers of `fail` are given again and again
    slow: threading.Event | None = None  # data of weights wait for it
    asked: list[str] = field(default_factory=list)  # "METHOD path" of every request
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for failure in self.fail:
            if failure[0] in path:
                if not self.always:
                    self.fail.remove(failure)
                return failure[1], failure[2], b"{}"
        if path.startswith("/api/models/org/name"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", "v1", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
        if path.startswith("/org/name/resolve/"):
            name = path.removeprefix("/org/name/resolve/").partition("/")[2]
            if name in self.files:
                data = self.files[name]
                own = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                return 200, own, data
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    @property
    def fetched(self) -> list[str]:
        """Files of which the data were asked for."""
        return [path.split("/", 5)[5] for path in self.asked if path.startswith("GET /org/name/resolve/")]


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, data = hub.answer(self.path.partition("?")[0])
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                if hub.slow is not None and self.path.endswith(".safetensors"):
                    self.wfile.write(data[:1000])
                    self.wfile.flush()
                    hub.slow.wait(60)
                    return
                self.wfile.write(data)

        do_GET = do_HEAD = reply

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        if hub.slow is not None:
            hub.slow.set()
        server.shutdown()
        server.server_close()
