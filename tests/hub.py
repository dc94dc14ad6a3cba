"""A small hub on the loopback interface: one repository, its files, nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO = "kimi/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class SmallHub:
    """Serves a folder as the repository REPO.

    Attributes:
        endpoint: for HF_ENDPOINT.
        sent: file name -> bytes of it that went out.
        before_send: called with (name, bytes sent of it before) ahead of each block; a
            ConnectionError breaks the connection there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: dict[str, int] = {}
        self.before_send: Callable[[str, int], object] = lambda name, sent: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        if re.fullmatch(rf"/api/models/{REPO}(/revision/(main|{COMMIT}))?", path):
            files = sorted(p for p in self.folder.iterdir() if p.is_file())
            siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
            value = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}
            self._send(request, 200, json.dumps(value).encode(), {}, body)
            return
        match = re.fullmatch(rf"/{REPO}/resolve/(main|{COMMIT})/([^/]+)", path)
        file = self.folder / match[2] if match else None
        if file is None or not file.is_file():
            known = path.startswith((f"/{REPO}/", f"/api/models/{REPO}/"))
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._send(request, 404, b"{}", {"X-Error-Code": code}, body)
            return
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, begin, end = 200, 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if wanted:
            status, begin = 206, int(wanted[1])
            end = min(end, int(wanted[2]) + 1) if wanted[2] else end
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self._send(request, status, content[begin:end], headers, body, file.name)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str],
        body: bool, name: str = "",
    ) -> None:  # fmt: skip
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            request.send_header(key, value)
        request.end_headers()
        if not body:
            return
        try:
            for i in range(0, len(data), 8192):
                self.before_send(name, self.sent.get(name, 0))
                block = data[i : i + 8192]
                request.wfile.write(block)
                self.sent[name] = self.sent.get(name, 0) + len(block)
        except ConnectionError:
            request.close_connection = True


@contextmanager
def small_hub(folder: Path) -> Iterator[SmallHub]:
    hub = SmallHub(folder)
    thread = threading.Thread(target=hub.serve, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.stop()
        thread.join()
