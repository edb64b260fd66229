"""Budget meter: what a run's machines cost while it runs, and whether that exceeds its limits.

Every machine states its own price in the environment variable `FORGE_USD_PER_HOUR`, which its cluster sets.
The machine of the supervisor is counted too, whether workers run on it or not, because it is rented for the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from forge.errors import ClusterError
from forge.events import CostUpdated

PRICE_VARIABLE = "FORGE_USD_PER_HOUR"
"""Environment variable with the price of one machine, USD per hour."""
ON_DEMAND_VARIABLE = "FORGE_ON_DEMAND_USD_PER_HOUR"
"""Environment variable of a spot machine with the price of the same machine on demand, if that is known."""
MTBF_VARIABLE = "FORGE_MTBF_HOURS"
"""Environment variable of a spot machine with the mean hours until one of its type is interrupted, if known."""
LIMIT_VARIABLE = "FORGE_MAX_USD_PER_HOUR"
"""Environment variable on the head with the cluster file's `max_usd_per_hour`, for all machines together."""

_REPORT_EVERY_S = 60.0


def read_price(environment: Mapping[str, str]) -> float | None:
    """Return the price of the machine with this environment in USD per hour; None if it is not set.

    Raises: ClusterError if the variable does not hold a price.
    """
    return _read_usd(environment, PRICE_VARIABLE)


def read_saving(environment: Mapping[str, str]) -> float:
    """Return how much less than on demand the machine with this environment costs, in USD per hour; 0 if unknown.

    Raises: ClusterError if a variable does not hold a price.
    """
    price, on_demand = read_price(environment), _read_usd(environment, ON_DEMAND_VARIABLE)
    return max(0.0, on_demand - price) if price is not None and on_demand is not None else 0.0


def read_mtbf_s(environment: Mapping[str, str]) -> float | None:
    """Return the mean time until the machine with this environment is interrupted, in seconds; None if unknown."""
    with contextlib.suppress(ValueError):
        hours = float(environment.get(MTBF_VARIABLE, ""))
        return 3600 * hours if 0 < hours < float("inf") else None
    return None


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

    def __init__(
        self,
        limits: CostLimits,
        *,
        head: str,
        head_usd_per_hour: float | None,
        spent_usd: float,
        saved_usd: float = 0.0,
    ) -> None:
        """Args:
        head: address of the machine with the supervisor.
        spent_usd: what this run has cost before this process started.
        saved_usd: how much less than on demand, likewise.
        """
        self._limits, self._head = limits, {head: head_usd_per_hour}
        self._prices: dict[str, tuple[str, float | None]] = {}
        self._usd_per_hour: float | None = None
        self._saving_usd_per_hour = 0.0
        self._unpriced_host: str | None = None
        self._counted_at: float | None = None
        self._reported: tuple[float, float] | None = None
        self.spent_usd, self.saved_usd = spent_usd, saved_usd
        self._savings: dict[str, tuple[str, float]] = {}

    @property
    def usd_per_hour(self) -> float:
        """Sum over all machines with a known price; a machine with several agents counts once."""
        if self._usd_per_hour is None:  # cached: read several times per second, over thousands of machines
            machines = self._head | dict(self._prices.values())
            self._saving_usd_per_hour = sum(dict(self._savings.values()).values())
            self._usd_per_hour = sum(price for price in machines.values() if price is not None)
            self._unpriced_host = min(
                (host for host, price in self._prices.values() if price is None), default=None
            )
        return self._usd_per_hour

    def add_agent(
        self, node: str, *, host: str, usd_per_hour: float | None, saving_usd_per_hour: float = 0.0
    ) -> None:
        """Count the machine of an agent that has connected."""
        self._prices[node] = (host, usd_per_hour)
        self._savings[node] = (host, saving_usd_per_hour)
        self._usd_per_hour = None

    def remove_agent(self, node: str) -> None:
        """Stop counting the machine of an agent that is gone, unless another agent runs on it."""
        self._prices.pop(node, None)
        self._savings.pop(node, None)
        self._usd_per_hour = None

    def count(self, now: float) -> None:
        """Add the cost of the time since the last call.

        Args:
            now: seconds on a monotonic clock.
        """
        if self._counted_at is not None:
            hours = (now - self._counted_at) / 3600
            self.spent_usd += self.usd_per_hour * hours
            self.saved_usd += self._saving_usd_per_hour * hours
        self._counted_at = now

    def take_report(self, now: float) -> bool:
        """Return True, once, when the cost is due to be reported: the rate changed, or a minute has passed."""
        rate, last = self.usd_per_hour, self._reported
        if last is not None and last[1] == rate and (now - last[0] < _REPORT_EVERY_S or not rate):
            return False
        self._reported = (now, rate)
        return bool(rate) or last is not None

    def cost(self) -> CostUpdated:
        """Return the event that reports the cost so far."""
        return CostUpdated(usd=self.spent_usd, usd_per_hour=self.usd_per_hour, saved_usd=self.saved_usd)

    def violation(self) -> str | None:
        """Return why the run must stop, or None while it is within its limits.

        If the price of any machine is unknown, a limit cannot be enforced, so that is a violation too.
        """
        limits = self._limits
        if (limits.usd is None and limits.usd_per_hour is None) or not self._prices:
            return None
        rate = self.usd_per_hour
        if self._unpriced_host is not None:
            return (
                f"its cost is limited, but the price of {self._unpriced_host} is unknown: set usd_per_hour in the "
                f"cluster file, or {PRICE_VARIABLE} before the cluster is started"
            )
        if limits.usd is not None and self.spent_usd >= limits.usd:
            return f"it has cost {self.spent_usd:.2f} USD; the limit is {limits.usd:.2f} USD"
        if limits.usd_per_hour is not None and rate > limits.usd_per_hour:
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
