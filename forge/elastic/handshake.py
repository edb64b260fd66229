"""Proof of a run's secret between both ends of a connection, and the keys that authenticate its messages.

    nonces    both ends send 32 random bytes
    proofs    HMAC-SHA256 under the secret of role, both addresses and both nonces: the client's first, then the
              server's
    messages  each carries a tag, keyed BLAKE2b of its sequence number and text; each direction has its own key,
              derived like the proofs

A recorded proof is useless because of the nonces, a reflected one because of the role, and a relayed one because of
the addresses: a process at an address that a supervisor had before could otherwise pass on the nonces and proofs of
an agent and its new supervisor, and then speak in the agent's place. So these connections cannot pass through
address translation or a proxy; neither can Ray's own. The tags reveal messages that were inserted, changed,
repeated, left out or reordered. Nothing here encrypts.

No input or output: `forge.elastic.rpc` moves the bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from dataclasses import dataclass

NONCE_BYTES = 32
PROOF_BYTES = 32
TAG_BYTES = 16
_SEQUENCE = struct.Struct("<Q")


class AuthenticationError(ConnectionError):
    """The other end has not proved that it knows the run's secret, or a message is not from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What one end of a connection sends and expects once it knows both nonces."""

    own_proof: bytes
    sending: MessageKey
    receiving: MessageKey
    _expected_proof: bytes

    @classmethod
    def of(
        cls, sock: socket.socket, *, secret: bytes, own_nonce: bytes, their_nonce: bytes, is_server: bool
    ) -> Handshake:
        """Derive proofs and keys. Raises: OSError if the socket is not connected any more."""
        own, peer = list(sock.getsockname()), list(sock.getpeername())
        addresses = [peer, own] if is_server else [own, peer]
        nonces = their_nonce + own_nonce if is_server else own_nonce + their_nonce

        def derive(purpose: str) -> bytes:
            text = json.dumps([purpose, *addresses]).encode()
            return hmac.digest(secret, text + nonces, hashlib.sha256)

        own_role, their_role = ("server", "client") if is_server else ("client", "server")
        return cls(
            own_proof=derive(f"proof of the {own_role}"),
            _expected_proof=derive(f"proof of the {their_role}"),
            sending=MessageKey(derive(f"messages of the {own_role}")),
            receiving=MessageKey(derive(f"messages of the {their_role}")),
        )

    def verify(self, proof: bytes) -> None:
        """Raises: AuthenticationError if the other end does not know the secret."""
        if not hmac.compare_digest(proof, self._expected_proof):
            raise AuthenticationError(
                "the other end does not know this run's secret, or the connection was redirected by address "
                "translation or a proxy"
            )


class MessageKey:
    """Authenticates the messages of one direction of one connection, in their order."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=TAG_BYTES)
        self._next = 0

    def tag(self, text: bytes) -> bytes:
        """Return the tag of the next message."""
        digest = self._keyed.copy()
        digest.update(_SEQUENCE.pack(self._next))
        digest.update(text)
        self._next += 1
        return digest.digest()

    def verify(self, tag: bytes, *, text: bytes) -> None:
        """Raises: AuthenticationError if this is not the other end's next message."""
        if not hmac.compare_digest(tag, self.tag(text)):
            raise AuthenticationError("a message was changed, repeated, left out or inserted on its way")


def make_nonce() -> bytes:
    """Return random bytes for one connection."""
    return secrets.token_bytes(NONCE_BYTES)
