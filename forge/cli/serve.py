"""`forge serve`: a trained model behind OpenAI's API, and the commands for servers that run."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from forge.cli import serve_options as opt
from forge.cli.checkpoints import StepOption, parse_step
from forge.cli.options import ClusterOption, DetachOption, Output, OutputOption, RunsOption
from forge.cli.serve_table import server_facts, server_record, server_row

if TYPE_CHECKING:
    from forge.runtime.servers import ServerStatus
    from forge.serve.http.settings import ServerSettings
    from forge.units import Range

_START = "start"


class ServeGroup(TyperGroup):
    """Takes `forge serve RUN` for `forge serve start RUN`."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [_START, *args]
        return list(super().parse_args(context, args))


app = typer.Typer(
    cls=ServeGroup,
    no_args_is_help=True,
    help="Serve a model behind OpenAI's API: forge serve RUN|FOLDER; its options: forge serve start -h.",
    rich_markup_mode=None,
)


@app.command(_START)
def start(
    source: opt.SourceArgument,
    name: opt.NameOption = "default",
    model_name: opt.ModelNameOption = None,
    step: StepOption = None,
    ema: opt.EmaOption = False,
    adapter: opt.AdapterOption = None,
    engine: opt.EngineOption = opt.EngineName.AUTO,
    host: opt.HostOption = "127.0.0.1",
    port: opt.PortOption = 8000,
    keys: opt.KeysOption = None,
    tls_cert: opt.TlsCertOption = None,
    tls_key: opt.TlsKeyOption = None,
    replicas: opt.ReplicasOption = "1",
    max_running: opt.MaxRunningOption = None,
    max_queue: opt.MaxQueueOption = 256,
    max_connections: opt.MaxConnectionsOption = 4096,
    max_connections_per_client: opt.ClientConnectionsOption = 1024,
    requests_per_minute: opt.RequestsOption = None,
    tokens_per_minute: opt.TokensOption = None,
    seconds_per_request: opt.SecondsOption = None,
    drain: opt.DrainOption = 120.0,
    check: opt.CheckOption = True,
    cluster: ClusterOption = None,
    detach: DetachOption = False,
    runs: RunsOption = Path("runs"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Serve a run's newest checkpoint, or an exported folder, until Ctrl-C; with --detach in the background.

    With --cluster the server runs on the cluster's head, and its port there is reached by the same port here.

    Example:  forge serve start latest --port 8000   (`start` may be left out)
    """
    from forge.runs.find_model import require_weights
    from forge.serve.http.api_keys import KeyLimits
    from forge.serve.http.settings import ServerSettings

    folder, wanted = _source(source, runs=runs), _range(replicas)
    require_weights(folder, step=parse_step(step), ema=ema, is_elsewhere=cluster is not None)
    limits = KeyLimits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
        seconds_per_request=seconds_per_request,
    )  # fmt: skip
    settings = ServerSettings(
        name=name, source=str(folder), model_name=model_name or folder.name, step=parse_step(step), ema=ema,
        adapters=_adapters(adapter, runs=runs), host=host, port=port, keys_file=opt.absolute(keys), limits=limits,
        tls_cert=opt.absolute(tls_cert), tls_key=opt.absolute(tls_key), drain_s=drain, verify_start=check,
        max_connections=max_connections, max_connections_per_client=max_connections_per_client,
        max_queue=max_queue, max_running=max_running, min_replicas=max(1, wanted.low),
        engine=engine.value, max_replicas=max(1, wanted.high),
    )  # fmt: skip
    _serve(settings, cluster=cluster, detach=detach, output=output)


@app.command("status")
def status(name: opt.ServerArgument = None, output: OutputOption = Output.TABLE) -> None:
    """Show the servers of this machine and its clusters: what they serve, their load, and what tokens cost.

    Example:  forge serve status
    """
    from forge.cli import display
    from forge.remote.servers import find_any_server, list_any_servers

    servers = list_any_servers() if name is None else [find_any_server(name)]
    if output is Output.JSON:
        display.print_json([server_record(server) for server in servers])
    elif not servers:
        display.message("no server was started on this machine; start one: forge serve RUN")
    elif name is not None or len(servers) == 1:
        display.facts(server_facts(servers[0]))
    else:
        columns = ("server", "state", "address", "model", "replicas", "running", "waiting", "tokens/s")
        display.table(columns, [server_row(server) for server in servers])


@app.command("stop")
def stop(
    name: opt.ServerArgument = None,
    now: Annotated[bool, typer.Option("--now", help="Cut the running requests.")] = False,
) -> None:
    """Stop a server: it refuses new requests and finishes the running ones.

    Example:  forge serve stop
    """
    from forge.cli import display
    from forge.remote.servers import find_any_server, remote_server
    from forge.runtime.servers import server_process

    server = find_any_server(name)
    process = (remote_server(server.name) or server_process(server.name)) if server.is_alive else None
    if process is None:
        display.message(f"the server '{server.name}' does not run ({server.state})")
        return
    process.request_stop()
    if now:
        process.request_stop()
    display.message(f"stopping '{server.name}': running requests are finished first")
    process.wait()
    display.message(_stopped(find_any_server(server.name)))


@app.command("logs")
def logs(
    name: opt.ServerArgument = None,
    file: Annotated[str, typer.Option("--file", help="server, or a replica, as in replica-ab12.")] = "server",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Number of lines.")] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written until it ends.")
    ] = False,
) -> None:
    """Print the last lines of a server's log: one line for each request, and what happened to replicas.

    Example:  forge serve logs -n 20 -f
    """
    from forge.cli import display
    from forge.remote.servers import find_any_server, follow_server, server_lines

    server = find_any_server(name)
    display.print_text(server_lines(server, name=file, lines=lines) or "(empty)")
    if follow:
        for text in follow_server(server, name=file):
            sys.stdout.write(display.harmless(text))
            sys.stdout.flush()


@app.command("connect")
def connect(
    name: opt.ServerArgument = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on this machine; by default the server's.")
    ] = None,
) -> None:
    """Reach a server on a cluster by a port of this machine, until Ctrl-C, which leaves the server running.

    Example:  forge serve connect chat --port 9000
    """
    import threading

    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.remote.servers import find_any_server, remote_server

    server = find_any_server(name)
    if not server.is_alive:
        raise ArgumentError(f"the server '{server.name}' does not run ({server.state}); start it: forge serve RUN")
    if remote_server(server.name) is None:
        url = server.record.get("url", "")
        raise ArgumentError(f"the server '{server.name}' runs on this machine: {url}/v1 needs no connection")
    with _tunnel(server.name, local=port):
        display.message("Ctrl-C ends the connection; the server goes on")
        threading.Event().wait()


@app.command("update")
def update(
    source: opt.SourceArgument,
    name: Annotated[
        str | None, typer.Option("--name", help="The server; by default the only one that runs.")
    ] = None,
    step: StepOption = None,
    ema: opt.EmaOption = False,
    adapter: opt.OtherAdapterOption = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Give a server other weights: they are loaded beside those in use, which then finish what they began.

    Example:  forge serve update latest
    """
    from forge.cli import display
    from forge.remote.servers import find_any_server, update_any_server
    from forge.runs.find_model import require_weights

    server, folder = find_any_server(name), _source(source, runs=runs)
    require_weights(folder, step=parse_step(step), ema=ema, is_elsewhere="cluster" in server.record)
    changes: dict[str, Any] = {"source": str(folder), "step": parse_step(step), "ema": ema}
    changes |= {"adapters": _adapters(adapter, runs=runs)} if adapter else {}
    display.message(update_any_server(server, changes, on_message=display.message))


@app.command("key")
def key(
    name: Annotated[str, typer.Argument(help="Stands in logs and metrics.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="Append the key's digest to this file.")
    ] = None,
) -> None:
    """Make an API key: it is printed once, and its digest goes to the file for --keys.

    Example:  forge serve key alice --to keys.toml
    """
    from forge.cli import display
    from forge.serve.http.api_keys import add_key, new_key, table_of

    made = new_key()
    if to is None:
        display.message(f"put this into the file for --keys, then hand over the key:\n{table_of(name, key=made)}")
    else:
        add_key(to, name=name, key=made)
        display.message(f"its digest was added to {to}; the key itself is stored nowhere")
    display.print_text(made)


def _serve(settings: ServerSettings, *, cluster: str | None, detach: bool, output: Output) -> None:
    """Start a server, wait until it is ready, and follow it unless detached."""
    from forge.cli import display
    from forge.remote.servers import find_any_server, start_any_server
    from forge.runtime.servers import await_ready

    _require_valid(settings)
    display.message(f"serving {settings.source} as '{settings.model_name}'")
    start_any_server(settings, cluster=cluster, on_message=display.message)
    try:
        ready = await_ready(settings.name, on_message=display.message, look=find_any_server)
    except KeyboardInterrupt:
        display.interrupted("stopping the server, which is not ready yet; Ctrl-C again ends it at once")
        _stop(settings.name)
        raise
    if output is Output.JSON:
        display.print_json(server_record(ready))
    else:
        if ready.message:
            display.message(ready.message)
        if not settings.is_loopback and settings.tls_cert is None:
            display.warning("keys and texts travel unencrypted to other machines; give --tls-cert and --tls-key")
        where = "" if "cluster" not in ready.record else f" on the head of '{ready.record['cluster']}'"
        display.message(f"ready at {settings.url}/v1 (page: {settings.url}/){where}")
    if detach:
        if "cluster" in ready.record:
            display.next_command(f"forge serve connect {settings.name}", purpose="reach it from this machine")
        display.next_command(f"forge serve status {settings.name}", purpose="load and cost")
        return
    with _tunnel(settings.name, local=None):
        _follow(settings.name)


@contextlib.contextmanager
def _tunnel(name: str, *, local: int | None) -> Iterator[None]:
    """Reach a server on a cluster by a port of this machine; nothing for one of this machine."""
    from urllib.parse import urlsplit

    from forge.cli import display
    from forge.remote.servers import find_any_server, remote_server

    remote = remote_server(name)
    if remote is None:
        yield
        return
    url = urlsplit(str(find_any_server(name).record.get("url", "")))
    with remote.forward(url.port or 0, local=local or url.port or 0) as port:
        display.message(f"reached from this machine at {url.scheme}://127.0.0.1:{port}/v1")
        yield


def _follow(name: str) -> None:
    """Print the server's log until it ends; Ctrl-C drains it, a second one ends it."""
    from forge.cli import display
    from forge.errors import RunError
    from forge.remote.servers import find_any_server, follow_server

    try:
        for text in follow_server(find_any_server(name)):
            sys.stderr.write(display.harmless(text))
    except KeyboardInterrupt:
        display.interrupted("stopping: running requests are finished first; Ctrl-C again ends now")
        _stop(name)
    server = find_any_server(name)
    if server.state in ("failed", "died"):
        raise RunError(f"the server {server.state}: {server.message or 'see forge serve logs'}")
    display.message(_stopped(server))


def _stopped(server: ServerStatus) -> str:
    return f"stopped: {server.message.removeprefix('stopped ')}"


def _stop(name: str) -> None:
    from forge.remote.servers import remote_server
    from forge.runtime.servers import server_process

    process = remote_server(name) or server_process(name)
    if process is None:
        return
    process.request_stop()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.request_stop()
        process.wait()


def _source(source: str, *, runs: Path, marker: str = "config.json") -> Path:
    """The folder to serve. Raises: ArgumentError, with the subcommand if it was misspelt."""
    from forge.errors import ArgumentError
    from forge.runs.find_model import find_model

    try:
        return find_model(source, root=runs, marker=marker).absolute()
    except ArgumentError as error:
        commands = [command.name for command in app.registered_commands if command.name]
        nearest = difflib.get_close_matches(source, commands, n=1, cutoff=0.7)
        hint = f"; did you mean forge serve {nearest[0]}?" if nearest else ""
        raise ArgumentError(f"{error}{hint}") from None


def _adapters(given: list[str] | None, *, runs: Path) -> tuple[str, ...]:
    """Adapters with the folders that they are in. Raises: ArgumentError."""
    from forge.errors import ArgumentError

    found = []
    for text in given or ():
        name, _, source = text.partition("=")
        if not name or not source:
            raise ArgumentError(f"--adapter {text} must be NAME=RUN or NAME=FOLDER")
        found.append(f"{name}={_source(source, runs=runs, marker='adapter_config.json')}")
    return tuple(found)


def _require_valid(settings: ServerSettings) -> None:
    """Raises: ArgumentError for a limit, adapter or address that cannot be used."""
    from forge.errors import ArgumentError
    from forge.serve.http.api_keys import KEYS_VARIABLE
    from forge.serve.http.settings import require_authentication, require_certificate

    for each in fields(settings.limits):
        value = getattr(settings.limits, each.name)
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(f"--{each.name.replace('_', '-')} must be a positive number")
    certificate, key = (None if path is None else Path(path) for path in (settings.tls_cert, settings.tls_key))
    require_certificate(certificate, key)
    settings.named_adapters()
    has_keys = settings.keys_file is not None or bool(os.environ.get(KEYS_VARIABLE))
    require_authentication(settings, has_keys=has_keys)


def _range(text: str) -> Range:
    from forge.errors import ArgumentError
    from forge.units import parse_range

    try:
        return parse_range(text)
    except ValueError as error:
        raise ArgumentError(f"--replicas: {error}") from error
