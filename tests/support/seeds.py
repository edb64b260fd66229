"""The seed of all random choices of a test session: new each time, printed at the end, set by FORGE_TEST_SEED."""

from __future__ import annotations

import os

SEED = int(os.environ.get("FORGE_TEST_SEED") or int.from_bytes(os.urandom(4)))

FUZZ_SEED = int(os.environ.get("FORGE_FUZZ_SEED") or SEED)
"""The seed of the mutated inputs of `tests/support/fuzz.py`."""
