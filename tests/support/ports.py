"""What the listening ports of a cluster's processes show to a program without the cluster's token."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
from collections.abc import Iterable

import grpc
import psutil

_PATHS = ("/metrics", "/", "/api/version", "/api/jobs/", "/api/v0/nodes", "/nodes?view=summary")
"""Prometheus, the dashboard and the agents; their health checks answer everyone."""
_METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/NumPendingTasks",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.RayletDriver/ClusterInfo",
)


def open_ports(processes: Iterable[psutil.Process], *, host: str) -> dict[tuple[str, int], str]:
    """The ports of these processes that other machines reach, and the command line behind each.

    Args:
        host: this machine's address for other machines.
    """
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                address = ipaddress.ip_address(connection.laddr.ip) if connection.laddr else None
                if connection.status == psutil.CONN_LISTEN and address is not None and not address.is_loopback:
                    reached = host if address.is_unspecified else str(address)
                    found[reached, connection.laddr.port] = " ".join(process.cmdline())
    return found


def answers(host: str, port: int) -> list[str]:
    """Everything that a port answers to requests without a token, except refusals."""
    return [*_http_answers(host, port), *_grpc_answers(host, port)]


def requires_token(host: str, port: int) -> bool:
    """Whether a port refuses a request for want of a token, by HTTP or gRPC."""
    return "401" in _http_codes(host, port).values() or grpc.StatusCode.UNAUTHENTICATED in _grpc_codes(host, port)


def _http_answers(host: str, port: int) -> list[str]:
    return [
        f"http {path}: {code}" for path, code in _http_codes(host, port).items() if code not in ("", "401", "403")
    ]


def _http_codes(host: str, port: int) -> dict[str, str]:
    codes = {}
    for path in _PATHS:
        connection = http.client.HTTPConnection(host, port, timeout=3)
        try:
            connection.request("GET", path)
            codes[path] = str(connection.getresponse().status)
        except (OSError, http.client.HTTPException):
            codes[path] = ""
        finally:
            connection.close()
        if not codes[path]:
            break  # not an HTTP server
    return codes


def _grpc_answers(host: str, port: int) -> list[str]:
    return [
        f"grpc {method}"
        for method, code in zip(_METHODS, _grpc_codes(host, port), strict=False)
        if code is grpc.StatusCode.OK
    ]


def _grpc_codes(host: str, port: int) -> list[grpc.StatusCode]:
    codes = []
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=3)
                codes.append(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.append(error.code())
            if codes[-1] is grpc.StatusCode.UNAVAILABLE:
                break  # not a gRPC server
    return codes
