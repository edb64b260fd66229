"""Budget meter: what a run's machines cost while it runs, and whether that exceeds its limits.

Every machine states its own price in the environment variable `FORGE_USD_PER_HOUR`, which its cluster sets.
The machine of the supervisor is counted too, whether workers run on it or not, because it is rented for the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forge.errors import ClusterError

PRICE_VARIABLE = "FORGE_USD_PER_HOUR"
"""Environment variable with the price of one machine, USD per hour."""
LIMIT_VARIABLE = "FORGE_MAX_USD_PER_HOUR"
"""Environment variable on the head with the cluster file's `max_usd_per_hour`, for all machines together."""

_REPORT_EVERY_S = 60.0


def read_price(environment: Mapping[str, str]) -> float | None:
    """Return the price of the machine with this environment in USD per hour; None if it is not set.

    Raises: ClusterError if the variable does not hold a price.
    """
    return _read_usd(environment, PRICE_VARIABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLimits:
    """What a run may cost; None means no limit."""

    usd: float | None = None
    """In total, over all restarts of the run."""
    usd_per_hour: float | None = None
    """At any moment, for all machines of the run together."""

    def capped_by(self, environment: Mapping[str, str]) -> CostLimits:
        """Apply the hourly limit of the cluster file too. Raises: ClusterError if it is not a price."""
        limits = [
            limit for limit in (self.usd_per_hour, _read_usd(environment, LIMIT_VARIABLE)) if limit is not None
        ]
        return CostLimits(usd=self.usd, usd_per_hour=min(limits) if limits else None)


class CostMeter:
    """Adds up the cost of a run from the price of its machines and the time between two calls of `count`."""

    def __init__(self, limits: CostLimits, *, head: str, head_usd_per_hour: float | None, spent_usd: float) -> None:
        """Args:
        head: address of the machine with the supervisor.
        spent_usd: what this run has cost before this process started.
        """
        self._limits, self._head = limits, {head: head_usd_per_hour}
        self._prices: dict[str, tuple[str, float | None]] = {}
        self._usd_per_hour: float | None = None
        self._counted_at: float | None = None
        self._reported: tuple[float, float] | None = None
        self.spent_usd = spent_usd

    @property
    def usd_per_hour(self) -> float:
        """Sum over all machines with a known price; a machine with several agents counts once."""
        if self._usd_per_hour is None:  # cached: read several times per second, over thousands of machines
            machines = self._head | dict(self._prices.values())
            self._usd_per_hour = sum(price for price in machines.values() if price is not None)
        return self._usd_per_hour

    def add_agent(self, node: str, *, host: str, usd_per_hour: float | None) -> None:
        """Count the machine of an agent that has connected."""
        self._prices[node] = (host, usd_per_hour)
        self._usd_per_hour = None

    def remove_agent(self, node: str) -> None:
        """Stop counting the machine of an agent that is gone, unless another agent runs on it."""
        self._prices.pop(node, None)
        self._usd_per_hour = None

    def count(self, now: float) -> None:
        """Add the cost of the time since the last call.

        Args:
            now: seconds on a monotonic clock.
        """
        if self._counted_at is not None:
            self.spent_usd += self.usd_per_hour * (now - self._counted_at) / 3600
        self._counted_at = now

    def take_report(self, now: float) -> bool:
        """Return True, once, when the cost is due to be reported: the rate changed, or a minute has passed."""
        rate, last = self.usd_per_hour, self._reported
        if last is not None and last[1] == rate and (now - last[0] < _REPORT_EVERY_S or not rate):
            return False
        self._reported = (now, rate)
        return bool(rate) or last is not None

    def violation(self) -> str | None:
        """Return why the run must stop, or None while it is within its limits.

        If the price of any machine is unknown, a limit cannot be enforced, so that is a violation too.
        """
        limits = self._limits
        if (limits.usd is None and limits.usd_per_hour is None) or not self._prices:
            return None
        unknown = sorted(host for host, price in self._prices.values() if price is None)
        if unknown:
            return (
                f"its cost is limited, but the price of {unknown[0]} is unknown: set usd_per_hour in the cluster "
                f"file, or {PRICE_VARIABLE} before the cluster is started"
            )
        if limits.usd is not None and self.spent_usd >= limits.usd:
            return f"it has cost {self.spent_usd:.2f} USD; the limit is {limits.usd:.2f} USD"
        if limits.usd_per_hour is not None and self.usd_per_hour > limits.usd_per_hour:
            rate = self.usd_per_hour
            return f"its machines cost {rate:.2f} USD per hour; the limit is {limits.usd_per_hour:.2f}"
        return None


def _read_usd(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        usd = float(text)
    except ValueError:
        usd = -1.0
    if not 0 <= usd < float("inf"):
        raise ClusterError(f"{name} is {text!r}; it must be a price in USD per hour, such as 1.25")
    return usd
