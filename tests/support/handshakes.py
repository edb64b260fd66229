"""Handshakes that prove no addresses, for tests that put a proxy between both ends."""

from __future__ import annotations

import pytest

from forge.elastic.handshake import Handshake


class _Anywhere:
    """A connected socket whose ends have one address."""

    def getsockname(self) -> tuple[str, int]:
        return "anywhere", 1

    getpeername = getsockname


def ignore_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derive proofs and keys from the nonces alone."""
    derive = Handshake.of
    monkeypatch.setattr(Handshake, "of", lambda _, **options: derive(_Anywhere(), **options))  # type: ignore[arg-type]
