"""A web server over a folder on 127.0.0.1: answers range requests, counts them, and misbehaves when told to."""

import http.server
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from geomcache.pipeline.store.objects import ObjectStore


class Server(http.server.ThreadingHTTPServer):
    """A folder on 127.0.0.1 with Range support; it counts what is asked for and can misbehave."""

    daemon_threads = True
    request_queue_size = 128  # of connections; the default of 5 lets clients wait a second

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.lock = threading.Lock()
        self.busy = self.most_busy = self.held_back = 0
        self.fault, self.status = "", 0
        self.answering = threading.Event()
        self.answering.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def hold(self, count: int) -> None:
        """From now on answer nobody until ``count`` requests are waiting at once."""
        self.held_back = count
        (self.answering.clear if count else self.answering.set)()

    def ranges(self) -> list[str | None]:
        """The Range headers since the last call, in the order of their places."""
        asked, self.requests = [request[2] for request in self.requests], []
        return sorted(asked, key=lambda text: int((re.findall(r"\d+", text or "") or [-1])[0]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        with server.lock:
            server.requests.append((self.command, self.path, asked, self.headers.get("Authorization")))
            server.busy += 1
            server.most_busy = max(server.busy, server.most_busy)
            if server.busy >= server.held_back:
                server.answering.set()
        try:
            if not server.answering.wait(20):
                return
            self.answer(asked)
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, asked: str | None) -> None:
        file = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if self.server.status:
            return self.send(self.server.status, b"<Error>no</Error>")
        if not file.is_file():
            return self.send(404, b"")
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
        if not found or self.server.fault == "ranges ignored":
            return self.send(200, data)
        first, last = found.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self.send(416, b"", f"bytes */{len(data)}")
        if self.server.fault == "another range":
            return self.send(206, data[:10], f"bytes 0-9/{len(data)}")
        return self.send(206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}")

    def send(self, code: int, body: bytes, content_range: str = "") -> None:
        if self.server.fault == "fewer bytes" and code == 206:
            body = body[:-3]
        self.send_response(code)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.send_header("ETag", '"1"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.fault in ("breaks off", "stalls"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if self.server.fault == "breaks off":
                self.close_connection = True
            else:
                time.sleep(2)
            return
        self.wfile.write(body)


def ranges(store: ObjectStore, path: str, offsets: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """What ``read_ranges`` puts into fresh buffers."""
    buffers = [bytearray(b"\xee" * length) for length in lengths]
    store.read_ranges(path, offsets, [memoryview(buffer) for buffer in buffers])
    return [bytes(buffer) for buffer in buffers]
