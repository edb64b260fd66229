"""Settings of a server: the model, its address, its limits. They are written to `server.json` of its folder."""

from __future__ import annotations

import errno
import ipaddress
import json
import re
import socket
import ssl
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forge.errors import ArgumentError, ClusterError, printable
from forge.process import one_line
from forge.serve.http.api_keys import KeyLimits

SETTINGS, STATUS, UPDATE = "server.json", "status.json", "update.json"
"""Files in the folder of a server: its options, its state once a second, the last request for other weights."""
SAFETY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
"""Of every answer."""
MAX_GENERATED = 64
"""Texts that one replica generates at the same time, unless the settings say how many."""
MAX_SINGLE = 256
"""The same of vectors, labels and translations: short texts share passes better in large batches."""
EXPORTS = "exports"
"""In that folder: weights of runs, while vLLM loads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The options of `forge serve`."""

    name: str
    """Of the server, for `forge serve status|stop|logs|update`."""
    source: str
    """The run folder or exported folder that is served."""
    model_name: str
    """What clients give as `model`."""
    engine: str = "auto"
    """`forge`, `vllm`, or `auto`: vLLM where replicas have an NVIDIA GPU and its environment was made."""
    step: int | str | None = None
    ema: bool = False
    adapters: tuple[str, ...] = ()
    """Adapters over the served base, as NAME=FOLDER; each is a model of its own name."""
    host: str = "127.0.0.1"
    port: int = 8000
    keys_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)
    """Of a key whose own limits are not given, and of all clients together where no key is needed."""
    max_queue: int = 256
    """Requests that wait for their first token; more are refused with status 429."""
    max_running: int | None = None
    """Texts that one replica computes at the same time; None: `MAX_GENERATED`, of models other than causal language
    models `MAX_SINGLE`."""
    max_connections: int = 4096
    """Open at the same time, also those without a request; more are refused with status 503."""
    max_connections_per_client: int = 1024
    """The same of one address, or of one IPv6 network of 64 bits. All clients behind a proxy have one address."""
    max_body_bytes: int = 4 * 2**20
    """Of a request. A prompt of a million tokens has about four bytes per token."""
    body_timeout_s: float = 30.0
    """For the whole body of a request to arrive."""
    write_timeout_s: float = 60.0
    """For a client to read the next part of its answer."""
    drain_s: float = 120.0
    """How long running requests may take to end once the server stops."""
    min_replicas: int = 1
    max_replicas: int = 1
    upscale_delay_s: float = 10.0
    """How long the load has to be high before a replica is added."""
    downscale_delay_s: float = 300.0
    """How long the load has to be low before one is removed: loading it again takes longer than waiting."""
    verify_start: bool = True
    """Compare served log-probabilities with the model's own before requests are accepted."""

    def named_adapters(self) -> dict[str, str]:
        """The folders of the adapters, by name. Raises: ArgumentError if a name is missing or taken."""
        found: dict[str, str] = {}
        for text in self.adapters:
            name, _, source = text.partition("=")
            if not name or not source or name in found or name == self.model_name:
                raise ArgumentError(f"--adapter {text} must be NAME=RUN or NAME=FOLDER, with a name of its own")
            found[name] = source
        return found

    @property
    def is_loopback(self) -> bool:
        """Whether it listens for this machine alone."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{'https' if self.tls_cert else 'http'}://{shown}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's loopback."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def named_host(header: str) -> str:
    """Return the host of a `Host` or `Origin` header, without scheme and port."""
    host = header.partition("://")[2] or header
    return host.rpartition(":")[0] if re.search(r":\d+$", host) else host


def is_host_name(text: str) -> bool:
    """Whether a text is a host's name or address, as a `Host` header has it without its port."""
    return re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})|\[?[0-9a-fA-F:.]{2,45}\]?", text) is not None


def claim_address(host: str, port: int) -> socket.socket:
    """Claim an address for a server that does not listen yet: until one does, several could bind the same.

    Returns: what holds the claim until it is closed.
    Raises: ClusterError if another server of this machine has it.
    """
    claim = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":  # a name without a file
        try:
            claim.bind(f"\0forge-serve-{host}-{port}")
        except OSError as error:
            claim.close()
            raise ClusterError(
                f"another server of this machine starts, runs or stops on port {port} of {host} (forge serve "
                "status); choose another with --port"
            ) from error
    return claim


def listen_on(host: str, port: int) -> socket.socket:
    """Take a port. Raises: ArgumentError for an address that is not of this machine; ClusterError if that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ArgumentError(
                f"--host {printable(host, limit=80)} cannot be listened on: {error.strerror}; give an address of "
                "this machine, or 0.0.0.0 for all of them"
            ) from error
        raise ClusterError(
            f"port {port} of {host} cannot be listened on: {error.strerror}; choose another with --port"
        ) from error
    return listener


def require_certificate(certificate: Path | None, key: Path | None) -> None:
    """Check that a certificate and its key can be used together.

    Raises: ArgumentError if one is missing, is not in PEM form, needs a password, or is not of the other.
    """
    if (certificate is None) != (key is None):
        raise ArgumentError("--tls-cert and --tls-key belong together")
    if certificate is None or key is None:
        return
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ArgumentError(f"{option} {path} cannot be read: {error.strerror}") from error

    def refuse() -> str:
        raise ArgumentError(f"--tls-key {key} has a password; write it without: openssl pkey -in {key} -out FILE")

    try:
        # OpenSSL would ask for the password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as error:
        reason = error.reason or "one of them is not in PEM form"
        raise ArgumentError(f"--tls-cert {certificate} and --tls-key {key} cannot be used: {reason}") from error


def require_authentication(settings: ServerSettings, *, has_keys: bool) -> None:
    """Check that a server which other machines reach has keys. Raises: ArgumentError that says how to make one."""
    if settings.is_loopback or has_keys:
        return
    raise ArgumentError(
        f"--host {settings.host} is reached by other machines, and no API key is set, so everyone could use the "
        "model; make one with forge serve key, and name its file with --keys, or set FORGE_SERVE_API_KEYS"
    )


def settings_to_json(settings: ServerSettings) -> str:
    """Write settings as the JSON of `server.json`."""
    return json.dumps(asdict(settings), indent=1) + "\n"


def settings_from_json(text: str) -> ServerSettings:
    """Read `server.json`. Raises: ArgumentError if it is not that of this version."""
    try:
        fields = json.loads(text)
        limits = KeyLimits(**fields.pop("limits"))
        return ServerSettings(**fields | {"limits": limits, "adapters": tuple(fields["adapters"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArgumentError(f"the settings of the server cannot be read: {one_line(error)}") from error
