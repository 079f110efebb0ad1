"""An S3 server in a process of its own, and a proxy before it that counts requests and spoils
answers."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "rows"
# Names of what the proxy can do to a request.
FAULTS = (
    "slow", "stalled", "cut", "500", "503", "truncated", "wrong bytes", "missing", "expired",
)  # fmt: skip
_EXPIRED = (
    b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)
_MISSING = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>No.</Message></Error>'
SLOW_SECONDS = 0.25


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def moto() -> Iterator[int]:
    """Runs moto's server. Yields its port."""
    port = free_port()
    words = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                ask(port, "PUT", f"/{BUCKET}")
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait()


def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Sends a request. Returns the status and the body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    signature = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders="
    connection.request(method, path, body, {"Authorization": f"{signature}host, Signature=0"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


class Proxy:
    """Passes requests on to a server.

    Attributes:
        requests: Method and path of each request, in order.
        spoil: Function that returns the fault of a request by its method and path. None for none.
    """

    def __init__(self, port: int) -> None:
        self.requests: list[tuple[str, str]] = []
        self.spoil: Callable[[str, str], str | None] = lambda method, path: None
        # Set when stalled requests are to end.
        proxy, self._ended = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Otherwise each small answer waits 40 ms.
            disable_nagle_algorithm = True
            wbufsize = 2**16

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def answer(self) -> None:
                proxy._answer(self, port)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

            def log_message(self, *words: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *words: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, fault: str | None, *words: str, methods: str = "GET PUT") -> None:
        """Spoils all requests whose path has one of some words, or all if there are none.

        Requests that are stalled from before end without an answer.
        """
        self._ended.set()
        self._ended = threading.Event()

        def spoil(method: str, path: str) -> str | None:
            chosen = method in methods.split() and (not words or any(w in path for w in words))
            return fault if chosen else None

        self.spoil = spoil

    def _answer(self, handler: Any, port: int) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        method, path, ended = handler.command, handler.path, self._ended
        self.requests.append((method, path))
        fault = self.spoil(method, path)
        if fault == "slow":
            ended.wait(SLOW_SECONDS)
        if fault == "stalled":
            ended.wait()
            handler.close_connection = True
            return
        made: dict[str | None, tuple[int, bytes]] = {
            "500": (500, b""),
            "503": (503, b""),
            "missing": (404, _MISSING),
            "expired": (400, _EXPIRED),
        }
        headers: list[tuple[str, str]] = []
        if fault in made:
            status, content = made[fault]
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, path, body, dict(handler.headers.items()))
            answer = connection.getresponse()
            status, content, headers = answer.status, answer.read(), answer.getheaders()
            connection.close()
        length = len(content)
        if method == "GET" and status == 200 and content:
            if fault == "truncated":
                content = content[: length // 2]
                length = len(content)
            elif fault == "wrong bytes":
                middle = length // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault == "cut":
            content = content[: length // 2]
            handler.close_connection = True
            if not content:
                return
        handler.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                handler.send_header(name, value)
        if method == "HEAD":
            length = int(dict(headers).get("Content-Length") or 0)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if method != "HEAD":
            handler.wfile.write(content)
        handler.wfile.flush()


def environment(port: int) -> dict[str, str]:
    """Variables that a user of S3 sets."""
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


def set_environment(port: int) -> None:
    os.environ.update(environment(port))
