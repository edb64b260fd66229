"""A price list on loopback: answers of the clouds' real form, in pages, with throttling and refusals."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]
Reply = Callable[[str, dict[str, str], bytes], Answer]
"""Answers a request from its path with query, its headers and its body."""


@dataclass
class PriceServer:
    """The server, its address, and what it was asked."""

    reply: Reply
    url: str = ""
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)


def as_json(body: Any, *, status: int = 200, **headers: str) -> Answer:
    """Return an answer with a JSON body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json"} | named, json.dumps(body).encode()


@contextmanager
def serve_prices(reply: Reply) -> Iterator[PriceServer]:
    """Serve until the block ends."""
    served = PriceServer(reply=reply)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.asked.append(self.path)
            served.headers.append(dict(self.headers))
            served.times[self.path] += 1
            status, headers, content = served.reply(self.path, dict(self.headers), body)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
