"""Metrics of a server in Prometheus' text format, and the figures that `forge serve status` shows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_WINDOW_S = 60.0
"""Over which the current throughput is measured."""
_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Telemetry:
    """Counts requests and tokens; one per server process."""

    def __init__(self, *, usd_per_hour: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        usd_per_hour: price of the machines; None if unknown.
        """
        self._clock, self._usd_per_hour = clock, usd_per_hour
        self._began = clock()
        self._recent: deque[tuple[float, int]] = deque()
        self._busy_since: float | None = None
        self._busy_s = 0.0
        self._num_completion_tokens = self._num_prompt_tokens = 0
        self.registry = registry = CollectorRegistry()
        shared: dict[str, Any] = {"registry": registry, "namespace": "forge"}
        self._requests = Counter("requests", "Requests answered.", ("route", "status"), **shared)
        self._prompt = Counter("prompt_tokens", "Tokens of prompts.", ("key",), **shared)
        self._completion = Counter("completion_tokens", "Tokens generated.", ("key",), **shared)
        self._ttft = Histogram(
            "time_to_first_token_seconds", "From the request to its first token.", buckets=_TTFT_BUCKETS, **shared
        )
        self._latency = Histogram(
            "request_seconds", "From the request to its end.", ("route",), buckets=_LATENCY_BUCKETS, **shared
        )
        self._cut = Counter("requests_cut", "Requests cancelled, by reason.", ("reason",), **shared)
        self._waiting = Gauge("queue_waiting", "Requests without a first token.", **shared)
        self._running = Gauge("queue_running", "Requests being generated.", **shared)
        self._connections = Gauge("connections", "Open connections.", **shared)
        self._refused = Counter("connections_refused", "Connections refused, by limit.", ("limit",), **shared)
        self._replicas = Gauge("replicas", "Replicas that answer.", **shared)
        self._cache = Gauge("cache_use_ratio", "Share of the key-value cache in use.", ("replica",), **shared)
        Gauge("tokens_per_second", "Over the last minute.", **shared).set_function(self.tokens_per_s)
        self._usd = Gauge("usd_per_million_tokens", "While generating; nan if the price is unknown.", **shared)
        self._usd.set_function(lambda: float("nan") if (usd := self.usd_per_million_tokens()) is None else usd)

    def answered(self, *, route: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()

    def queue(self, *, waiting: int, running: int) -> None:
        """Note the requests in the server."""
        self._waiting.set(waiting)
        self._running.set(running)
        is_busy, now = waiting + running > 0, self._clock()
        if is_busy and self._busy_since is None:
            self._busy_since = now
        elif not is_busy and self._busy_since is not None:
            self._busy_s += now - self._busy_since
            self._busy_since = None

    def first_token(self, seconds: float) -> None:
        """Count the time to a request's first token."""
        self._ttft.observe(seconds)

    def generated(self, num_tokens: int, *, key: str) -> None:
        """Count generated tokens, as they come."""
        self._completion.labels(key).inc(num_tokens)
        self._num_completion_tokens += num_tokens
        now = self._clock()
        self._recent.append((now, num_tokens))
        while self._recent and self._recent[0][0] < now - _WINDOW_S:
            self._recent.popleft()

    def prompted(self, num_tokens: int, *, key: str) -> None:
        """Count the tokens of a prompt."""
        self._prompt.labels(key).inc(num_tokens)
        self._num_prompt_tokens += num_tokens

    def finished(self, *, route: str, seconds: float) -> None:
        """Count the duration of a request."""
        self._latency.labels(route).observe(seconds)

    def cut(self, reason: str) -> None:
        """Count a request that ended early: `client`, `time`, `replica` or `stop`."""
        self._cut.labels(reason).inc()

    def connections(self, count: int) -> None:
        """Note how many connections are open."""
        self._connections.set(count)

    def refused(self, limit: str) -> None:
        """Count a connection that is one too many: in `all`, or of its `client`."""
        self._refused.labels(limit).inc()

    def replicas(self, stats: Mapping[str, Mapping[str, Any]]) -> None:
        """Note the state of the replicas, by id."""
        self._replicas.set(len(stats))
        self._cache.clear()
        for replica, each in stats.items():
            if each.get("cache_use") is not None:
                self._cache.labels(replica).set(each["cache_use"])

    def tokens_per_s(self) -> float:
        """Generated tokens per second of the last minute."""
        now = self._clock()
        recent = sum(count for at, count in self._recent if at >= now - _WINDOW_S)
        return recent / max(1e-9, min(_WINDOW_S, now - self._began))

    def usd_per_million_tokens(self) -> float | None:
        """The price of a million generated tokens at the throughput measured while requests were running."""
        if self._usd_per_hour is None or not self._num_completion_tokens:
            return None
        return self._usd_per_hour / 3600 * self._busy_seconds() / self._num_completion_tokens * 1e6

    def figures(self) -> dict[str, Any]:
        """What `forge serve status` shows."""
        busy = self._busy_seconds()
        return {
            "uptime_s": self._clock() - self._began,
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "tokens_per_s": self.tokens_per_s(),
            "busy_tokens_per_s": self._num_completion_tokens / busy if busy else None,
            "usd_per_hour": self._usd_per_hour,
            "usd_per_million_tokens": self.usd_per_million_tokens(),
        }

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _busy_seconds(self) -> float:
        now = self._clock()
        return self._busy_s + (now - self._busy_since if self._busy_since is not None else 0.0)
