"""The part of a W&B server that `wandb sync` needs; it keeps each run's history by the numbers of its lines."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HISTORY = "wandb-history.jsonl"


class WandbServer:
    """The runs that were uploaded."""

    def __init__(self) -> None:
        self.url = ""
        self.num_requests = 0
        self._history: dict[str, dict[int, str]] = {}
        """Lines of each run's history, by their number."""

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Return the history of a run."""
        return [json.loads(line) for _, line in sorted(self._history.get(run_id, {}).items())]

    def forget(self, run_id: str, *, after: int) -> None:
        """Keep only the first rows of a run."""
        self._history[run_id] = {number: line for number, line in self._history[run_id].items() if number < after}

    def stream(self, run_id: str, files: dict[str, Any]) -> None:
        """Take lines of a run's files; a line that is there already is replaced."""
        part = files.get(_HISTORY, {"offset": 0, "content": []})
        lines = self._history.setdefault(run_id, {})
        lines.update({part["offset"] + number: line for number, line in enumerate(part["content"])})

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL query."""
        if "upsertBucket" in query:
            self._history.setdefault(variables["name"], {})
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": False}}
        if "historyLineCount" in query:
            is_known = variables["name"] in self._history
            bucket = self._bucket(variables["name"]) if is_known else None
            return {"model": {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "me", "flags": "{}", "username": "me", "teams": {"edges": []}}}
        return {}

    def _bucket(self, run_id: str) -> dict[str, Any]:
        lines = self._history[run_id]
        tail = [lines[max(lines)]] if lines else []
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"summaryMetrics": "{}", "config": "{}", "historyTail": json.dumps(tail), "eventsTail": "[]"}
        names = {"id": "r", "name": run_id, "displayName": run_id, "wandbConfig": '{"t": 1}', "tags": []}
        project = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}}
        return counts | texts | names | {"project": project}


class _Handler(BaseHTTPRequestHandler):
    wandb: WandbServer

    def parse_request(self) -> bool:
        self.wandb.num_requests += 1
        return super().parse_request()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        try:
            body = json.loads(self._body())
        except ValueError:  # telemetry
            self._answer({})
            return
        if self.path.endswith("file_stream"):
            self.wandb.stream(self.path.split("/")[-2], body.get("files") or {})
            self._answer({})
        else:
            self._answer({"data": self.wandb.answer(body.get("query", ""), body.get("variables") or {})})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _answer(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Serve on a free port of this machine."""
    wandb = WandbServer()
    handler = type("Handler", (_Handler,), {"wandb": wandb})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        wandb.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield wandb
        server.shutdown()
