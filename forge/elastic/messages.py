"""The JSON of messages between processes of a run (`forge.elastic.rpc` sends them)."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any


class SharedMessage(dict[str, Any]):
    """A message to many receivers, or with fields that many messages have in common: their JSON is made only once.

    Neither the message nor its values may be changed.
    """

    __slots__ = ("_common", "_json", "_own")

    def __init__(self, fields: dict[str, Any], *, common: SharedMessage | None = None) -> None:
        """Args:
        fields: at least one.
        common: further fields, of the same object for all messages that have them in common.
        """
        super().__init__(fields if common is None else common | fields)
        self._own, self._common = fields, common
        self._json: bytes | None = None

    def to_json(self) -> bytes:
        """Return the message as JSON."""
        if self._common is not None:
            return self._common.to_json()[:-1] + b", " + json.dumps(self._own).encode()[1:]
        if self._json is None:
            self._json = json.dumps(self._own).encode()
        return self._json


def to_json(message: dict[str, Any]) -> bytes:
    """Return the JSON of a message, as it is sent."""
    return message.to_json() if isinstance(message, SharedMessage) else json.dumps(message).encode()


def from_json(text: bytes) -> dict[str, Any]:
    """Return a received message. Raises: ValueError if it is not a JSON object."""
    try:
        message = json.loads(text.decode())
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None
    if not isinstance(message, dict):
        raise ValueError("the message is not a JSON object")
    return message


def pack(value: Any) -> str:
    """Compress a JSON value to a string, for long values that are sent to many agents."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode())).decode()


def unpack(text: str) -> Any:
    """Return the value that was packed."""
    return json.loads(zlib.decompress(base64.b64decode(text)))
