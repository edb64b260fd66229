"""Limits of requests and tokens per key: token buckets that hold one minute's worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from forge.serve.http.api_keys import ApiKey
from forge.serve.http.errors import ApiError


@dataclass(slots=True, kw_only=True)
class TokenBucket:
    """An amount that refills steadily up to one minute's worth; it may be overdrawn once."""

    per_minute: float
    amount: float
    at: float

    @property
    def capacity(self) -> float:
        """The most it holds: one minute's worth, and at least one request."""
        return max(1.0, self.per_minute)

    def refill(self, now: float) -> None:
        """Add what has accrued since the last call."""
        self.amount = min(self.capacity, self.amount + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, amount: float) -> float:
        """Seconds until it holds an amount."""
        return max(0.0, (amount - self.amount) * 60 / self.per_minute)


class RateLimiter:
    """Counts what each key uses.

    A request is counted when it is accepted, its tokens when they are known. So a key may exceed its tokens by one
    answer, and then waits until that is paid off.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], TokenBucket] = {}

    def admit(self, key: ApiKey) -> None:
        """Count a request. Raises: ApiError with status 429 if the key has used up a limit."""
        requests = self._bucket(key, "requests", key.limits.requests_per_minute)
        tokens = self._bucket(key, "tokens", key.limits.tokens_per_minute)
        for name, bucket in (("requests", requests), ("tokens", tokens)):
            if bucket is not None and bucket.amount < 1:
                raise ApiError(
                    f"the key '{key.name}' has used its {bucket.per_minute:g} {name} per minute",
                    status=429,
                    code="rate_limit_exceeded",
                    retry_after_s=bucket.seconds_until(1),
                )
        if requests is not None:
            requests.amount -= 1

    def charge(self, key: ApiKey, *, num_tokens: int) -> None:
        """Count the tokens of an answered or abandoned request."""
        bucket = self._bucket(key, "tokens", key.limits.tokens_per_minute)
        if bucket is not None:
            bucket.amount -= num_tokens

    def headers(self, key: ApiKey) -> dict[str, str]:
        """What is left, in the headers that OpenAI's clients know."""
        found = {}
        for name, limit in (
            ("requests", key.limits.requests_per_minute),
            ("tokens", key.limits.tokens_per_minute),
        ):
            bucket = self._bucket(key, name, limit)
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:.0f}"
                found[f"x-ratelimit-remaining-{name}"] = f"{max(0, int(bucket.amount))}"
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.capacity):.0f}s"
        return found

    def _bucket(self, key: ApiKey, name: str, per_minute: float | None) -> TokenBucket | None:
        if per_minute is None:
            return None
        now = self._clock()
        bucket = self._buckets.get((key.name, name))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.name, name] = TokenBucket(
                per_minute=per_minute, amount=max(1.0, per_minute), at=now
            )
        bucket.refill(now)
        return bucket
