"""What `forge cluster status` makes of the answers of Ray's dashboard, recorded from ray 2.60."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from forge.cluster.base import ClusterNode
from forge.cluster.dashboard import ray_nodes

HEAD, WORKER = "a4ab1ca4" + 48 * "0", "0d5ce920" + 48 * "0"
RESERVED = "reserved in placement groups)"


def node(node_id: str, *, cpus: float = 4.0, **changes: Any) -> dict[str, Any]:
    total = {"memory": 2.3e10, "CPU": cpus, "GPU": 2.0}
    record = {"node_id": node_id, "node_ip": "10.0.0.1", "is_head_node": node_id == HEAD, "state": "ALIVE"}
    return record | {"resources_total": total, "end_time_ms": 0} | changes


def group(node_id: str | None, *, state: str = "CREATED", **resources: float) -> dict[str, Any]:
    return {"state": state, "bundles": [{"unit_resources": resources, "node_id": node_id}]}


@contextmanager
def dashboard(
    nodes: list[dict[str, Any]], *, groups: list[dict[str, Any]], used: Mapping[str, str]
) -> Iterator[str]:
    answers: dict[str, Any] = {
        "/api/v0/nodes": {"result": {"result": nodes}},
        "/api/v0/placement_groups": {"result": {"result": groups}},
        "/nodes": {"nodeLogicalResources": used},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"data": answers[self.path.partition("?")[0]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def found(
    *nodes: dict[str, Any], groups: list[dict[str, Any]] | None = None, used: Mapping[str, str] | None = None
) -> list[ClusterNode]:
    with dashboard(list(nodes), groups=groups or [], used=used or {}) as url:
        return ray_nodes(url, token="t", prices={})


@pytest.mark.parametrize(
    ("groups", "used", "free"),
    [
        ([], "0.0/4.0 CPU\n0B/1GiB memory", 4.0),
        ([], "1.5/4.0 CPU", 2.5),
        ([group(WORKER, CPU=1.0), group(WORKER, CPU=1.0)], f"0.0/4.0 CPU (0.0 used of 2.0 {RESERVED}", 2.0),
        ([group(WORKER, CPU=2.0)], f"1.5/4.0 CPU (0.5 used of 2.0 {RESERVED}", 1.0),
        ([group(WORKER, CPU=3.0)], "", 1.0),
        ([group(HEAD, CPU=3.0), group(None, state="PENDING", CPU=1.0)], "0.0/4.0 CPU", 4.0),
        ([group(WORKER, CPU=4.0, GPU=1.0)], "4.0/4.0 CPU", 0.0),
    ],
)
def test_free_cpus__reserved_and_used__neither_is_free(
    groups: list[dict[str, Any]], used: str, free: float
) -> None:
    (worker,) = found(node(WORKER), groups=groups, used={WORKER: used})
    assert worker.free_cpus == free


def test_free_gpus__placement_group__is_not_free() -> None:
    (worker,) = found(node(WORKER), groups=[group(WORKER, GPU=1.0)], used={WORKER: "0.5/2.0 GPU"})
    assert (worker.free_gpus, worker.num_gpus) == (0.5, 2.0)


@pytest.mark.parametrize(("kinds", "gpu"), [((), ""), (("H100",), "H100"), (("A100", "A100-80G"), "A100-80G")])
def test_gpu__accelerator_type__is_the_most_exact_one(kinds: tuple[str, ...], gpu: str) -> None:
    total = {"GPU": 2.0} | {f"accelerator_type:{kind}": 1.0 for kind in kinds}
    (worker,) = found(node(WORKER, resources_total=total))
    assert (worker.gpu, worker.num_gpus) == (gpu, 2.0)


def test_gone_s__dead_node__time_since_its_end() -> None:
    ended_ms = (time.time() - 700) * 1000
    head, worker = found(node(WORKER, state="DEAD", end_time_ms=ended_ms), node(HEAD))
    assert (head.kind, head.gone_s, worker.state) == ("head", None, "gone")
    assert worker.gone_s == pytest.approx(700, abs=60)
