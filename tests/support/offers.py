"""Offers of machines for tests."""

from __future__ import annotations

from datetime import date
from typing import Any

from forge.pricing.offer import InterruptionBand, Offer


def offer(**changes: Any) -> Offer:
    """A machine with one A10G for 1 USD an hour, 0.4 as spot."""
    values: dict[str, Any] = {
        "cloud": "aws",
        "instance": "g5.2xlarge",
        "gpu": "A10G",
        "num_gpus": 1,
        "gpu_memory_gib": 24,
        "num_cpus": 8,
        "memory_gib": 32,
        "inter_node_gbps": 5,
        "region": "us-east-1",
        "zone": None,
        "usd_per_hour": 1.0,
        "spot_usd_per_hour": 0.4,
        "interruption": InterruptionBand(low=0.05, high=0.10),
        "observed": date(2026, 6, 1),
        "source": "a list",
        "co2_g_per_hour": None,
    }
    return Offer(**values | changes)
