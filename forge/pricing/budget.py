"""What a run's machines cost while it goes on, and whether that is more than it may.

Every machine says its own price, `FORGE_USD_PER_HOUR`, which its cluster has put into its environment. The
machine with the supervisor is counted too, whether ranks work there or not: it is paid for the run's sake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from forge.errors import ClusterError

PRICE = "FORGE_USD_PER_HOUR"
"""The variable with a machine's price, USD per hour."""
LIMIT = "FORGE_MAX_USD_PER_HOUR"
"""The variable, on the head, with what the cluster's file allows all machines together."""

_TELL_EVERY_S = 60.0


def price_of(environment: Mapping[str, str]) -> float | None:
    """USD per hour of the machine whose environment this is; None if nobody has said.

    Raises: ClusterError if what stands there is no price.
    """
    return _usd(environment, PRICE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostLimits:
    """What a run may cost; None where nothing limits it."""

    usd: float | None = None
    """In all, over every time that it was carried on."""
    usd_per_hour: float | None = None
    """At any moment, all its machines together."""

    def within(self, environment: Mapping[str, str]) -> CostLimits:
        """And no more an hour than the cluster's file allows. Raises: ClusterError if that is no price."""
        told = [limit for limit in (self.usd_per_hour, _usd(environment, LIMIT)) if limit is not None]
        return CostLimits(usd=self.usd, usd_per_hour=min(told) if told else None)


class CostMeter:
    """Counts on from what was spent before."""

    def __init__(self, limits: CostLimits, *, head: str, head_usd_per_hour: float | None, spent_usd: float) -> None:
        """Args:
        head: The address of the machine with the supervisor.
        spent_usd: By this run until now.
        """
        self._limits, self._head = limits, {head: head_usd_per_hour}
        self._prices: dict[str, tuple[str, float | None]] = {}
        self._usd_per_hour: float | None = None
        self._counted_at: float | None = None
        self._told: tuple[float, float] | None = None
        self.spent_usd = spent_usd

    @property
    def usd_per_hour(self) -> float:
        """Of all machines whose price is known; each is counted once, however many agents it has."""
        if self._usd_per_hour is None:  # of thousands of machines, asked several times a second
            machines = self._head | dict(self._prices.values())
            self._usd_per_hour = sum(price for price in machines.values() if price is not None)
        return self._usd_per_hour

    def came(self, node: str, *, host: str, usd_per_hour: float | None) -> None:
        """An agent is there, on a machine of this price."""
        self._prices[node] = (host, usd_per_hour)
        self._usd_per_hour = None

    def went(self, node: str) -> None:
        """An agent is there no more."""
        self._prices.pop(node, None)
        self._usd_per_hour = None

    def count(self, now: float) -> None:
        """Add what the time since the last call has cost.

        Args:
            now: seconds, by a clock that only goes forward.
        """
        if self._counted_at is not None:
            self.spent_usd += self.usd_per_hour * (now - self._counted_at) / 3600
        self._counted_at = now

    def is_news(self, now: float) -> bool:
        """Whether it is worth telling: another price, or a minute later. Says so once."""
        rate = self.usd_per_hour
        if self._told is not None and self._told[1] == rate and (now - self._told[0] < _TELL_EVERY_S or not rate):
            return False
        is_first = self._told is None
        self._told = (now, rate)
        return bool(rate) or not is_first

    def complaint(self) -> str | None:
        """Why the run is to stop; None if it may go on. A limit that cannot be watched is no limit."""
        limits = self._limits
        if (limits.usd is None and limits.usd_per_hour is None) or not self._prices:
            return None
        unknown = sorted(host for host, price in self._prices.values() if price is None)
        if unknown:
            return (
                f"its cost is limited, and {unknown[0]} does not tell its price: set usd_per_hour in the cluster's "
                f"file, or {PRICE} before the cluster is started"
            )
        if limits.usd is not None and self.spent_usd >= limits.usd:
            return f"it has cost {self.spent_usd:.2f} USD, and may cost {limits.usd:.2f}"
        if limits.usd_per_hour is not None and self.usd_per_hour > limits.usd_per_hour:
            rate = self.usd_per_hour
            return f"its machines cost {rate:.2f} USD an hour together, and may cost {limits.usd_per_hour:.2f}"
        return None


def _usd(environment: Mapping[str, str], name: str) -> float | None:
    text = environment.get(name)
    if not text:
        return None
    try:
        usd = float(text)
    except ValueError:
        usd = -1.0
    if not 0 <= usd < float("inf"):
        raise ClusterError(f"{name} is {text!r}, and must be USD per hour, such as 1.25")
    return usd
