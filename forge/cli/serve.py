"""`forge serve`: a trained model behind OpenAI's API, and the commands for servers that run."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from forge.cli import serve_options as opt
from forge.cli.checkpoints import StepOption, parse_step
from forge.cli.options import DetachOption, Output, OutputOption, RunsOption

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
    help="Serve a model behind OpenAI's API: forge serve RUN|FOLDER.",
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
    max_running: opt.MaxRunningOption = 64,
    max_queue: opt.MaxQueueOption = 256,
    requests_per_minute: opt.RequestsOption = None,
    tokens_per_minute: opt.TokensOption = None,
    seconds_per_request: opt.SecondsOption = None,
    drain: opt.DrainOption = 120.0,
    check: opt.CheckOption = True,
    detach: DetachOption = False,
    runs: RunsOption = Path("runs"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Serve a run's newest checkpoint, or an exported folder, until Ctrl-C; with --detach in the background.

    Example:  forge serve start latest --port 8000   (`start` may be left out)
    """
    from forge.serve.http.api_keys import KeyLimits
    from forge.serve.http.settings import ServerSettings

    folder, wanted = _source(source, runs=runs), _range(replicas)
    limits = KeyLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        seconds_per_request=seconds_per_request,
    )
    settings = ServerSettings(
        name=name, source=str(folder), model_name=model_name or folder.name, step=parse_step(step), ema=ema,
        adapters=_adapters(adapter, runs=runs), host=host, port=port, keys_file=_absolute(keys), limits=limits,
        tls_cert=_absolute(tls_cert), tls_key=_absolute(tls_key), drain_s=drain, verify_start=check,
        max_queue=max_queue, max_running=max_running, min_replicas=max(1, wanted.low),
        engine=engine.value, max_replicas=max(1, wanted.high),
    )  # fmt: skip
    _serve(settings, detach=detach, output=output)


@app.command("status")
def status(name: opt.ServerArgument = None, output: OutputOption = Output.TABLE) -> None:
    """Show the servers of this machine: what they serve, their load, and what a million tokens cost.

    Example:  forge serve status
    """
    from forge.cli import display
    from forge.runtime.servers import find_server, list_servers

    servers = list_servers() if name is None else [find_server(name)]
    if output is Output.JSON:
        display.print_json([_record(server) for server in servers])
    elif not servers:
        display.message("no server was started on this machine; start one: forge serve RUN")
    elif name is not None or len(servers) == 1:
        display.facts(_facts(servers[0]))
    else:
        columns = ("server", "state", "address", "model", "replicas", "running", "waiting", "tokens/s")
        display.table(columns, [_row(server) for server in servers])


@app.command("stop")
def stop(
    name: opt.ServerArgument = None,
    now: Annotated[bool, typer.Option("--now", help="Cut the running requests.")] = False,
) -> None:
    """Stop a server: it refuses new requests and finishes the running ones.

    Example:  forge serve stop
    """
    from forge.cli import display
    from forge.runtime.servers import find_server, server_process

    server = find_server(name)
    process = server_process(server.name)
    if process is None:
        display.message(f"the server '{server.name}' does not run ({server.state})")
        return
    process.request_stop()
    if now:
        process.request_stop()
    display.message(f"stopping '{server.name}': running requests are finished first")
    process.wait()
    display.message(f"stopped: {find_server(server.name).message}")


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
    from forge.runs.logs import follow_log, last_lines, log_size
    from forge.runtime.servers import find_server

    folder = find_server(name).folder
    size = log_size(folder, name=file)
    display.print_text(last_lines(folder, name=file, lines=lines) or "(empty)")
    if follow:
        for text in follow_log(folder, name=file, offset=size, goes_on=lambda: find_server(folder.name).is_alive):
            sys.stdout.write(display.harmless(text))
            sys.stdout.flush()


@app.command("update")
def update(
    source: opt.SourceArgument,
    name: Annotated[
        str | None, typer.Option("--name", help="The server; by default the only one that runs.")
    ] = None,
    step: StepOption = None,
    ema: opt.EmaOption = False,
    runs: RunsOption = Path("runs"),
) -> None:
    """Give a server other weights: they are loaded beside those in use, which then finish what they began.

    Example:  forge serve update latest
    """
    from forge.cli import display
    from forge.runtime.servers import find_server, update_server

    server = find_server(name)
    changes = {"source": str(_source(source, runs=runs)), "step": parse_step(step), "ema": ema}
    display.message(update_server(server.name, changes, on_message=display.message))


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


def _serve(settings: ServerSettings, *, detach: bool, output: Output) -> None:
    """Start a server, wait until it is ready, and follow it unless detached."""
    from forge.cli import display
    from forge.runtime.servers import await_ready, start_server

    _require_valid(settings)
    display.message(f"serving {settings.source} as '{settings.model_name}'")
    start_server(settings)
    try:
        ready = await_ready(settings.name, on_message=display.message)
    except KeyboardInterrupt:
        _stop(settings.name)
        raise
    if output is Output.JSON:
        display.print_json(_record(ready))
    else:
        if ready.message:
            display.message(ready.message)
        if not settings.is_loopback and settings.tls_cert is None:
            display.warning("keys and texts travel unencrypted to other machines; give --tls-cert and --tls-key")
        display.message(f"ready at {settings.url}/v1 (page: {settings.url}/)")
    if detach:
        display.next_command(f"forge serve status {settings.name}", purpose="load and cost")
        return
    _follow(settings.name)


def _follow(name: str) -> None:
    """Print the server's log until it ends; Ctrl-C drains it, a second one ends it."""
    from forge.cli import display
    from forge.errors import RunError
    from forge.runs.logs import follow_log, log_size
    from forge.runtime.servers import find_server

    folder = find_server(name).folder
    size = log_size(folder, name="server")
    try:
        for text in follow_log(folder, name="server", offset=size, goes_on=lambda: find_server(name).is_alive):
            sys.stderr.write(display.harmless(text))
    except KeyboardInterrupt:
        display.message("stopping: running requests are finished first; Ctrl-C again ends now")
        _stop(name)
    server = find_server(name)
    if server.state in ("failed", "died"):
        raise RunError(f"the server {server.state}: {server.message or 'see forge serve logs'}")
    display.message(f"stopped: {server.message}")


def _stop(name: str) -> None:
    from forge.runtime.servers import server_process

    process = server_process(name)
    if process is None:
        return
    process.request_stop()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.request_stop()
        process.wait()


def _source(source: str, *, runs: Path, marker: str = "config.json") -> Path:
    """The folder to serve: one that has the file `marker`, or that of a run. Raises: ArgumentError."""
    from forge.runs.reader import find_run

    given = Path(source).expanduser()
    folder = given if (given / marker).is_file() else find_run(source, root=runs)
    return folder.absolute()


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


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())


def _require_valid(settings: ServerSettings) -> None:
    """Raises: ArgumentError for a limit, adapter or address that cannot be used."""
    from forge.errors import ArgumentError
    from forge.serve.http.api_keys import KEYS_VARIABLE
    from forge.serve.http.settings import require_authentication

    for each in fields(settings.limits):
        value = getattr(settings.limits, each.name)
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(f"--{each.name.replace('_', '-')} must be a positive number")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ArgumentError("--tls-cert and --tls-key are needed together")
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


def _record(server: ServerStatus) -> dict[str, Any]:
    return {**server.record, "name": server.name, "state": server.state, "folder": str(server.folder)}


def _row(server: ServerStatus) -> tuple[str, ...]:
    found = server.record
    speed = found.get("tokens_per_s")
    return (
        server.name,
        server.state,
        str(found.get("url", "")),
        str(found.get("model", "")),
        *(str(found.get(name, "")) for name in ("replicas", "running", "waiting")),
        "" if speed is None else f"{speed:.1f}",
    )


def _facts(server: ServerStatus) -> list[tuple[str, str]]:
    """The state of one server, line by line."""
    from forge.units import format_count, format_duration

    found = server.record
    rows = [("server", server.name), ("state", server.state), ("says", server.message)]
    rows += [
        (name, str(found[key]))
        for name, key in (("address", "url"), ("model", "model"), ("serves", "source"), ("engine", "engine"))
        if key in found
    ]
    if "replicas" not in found:
        return [row for row in rows if row[1]]
    busy, usd = found["busy_tokens_per_s"], found["usd_per_million_tokens"]
    speed = f"{found['tokens_per_s']:.1f} tokens/s over the last minute"
    if busy is not None:
        speed += f", {busy:.1f} while requests ran"
    price = f"{usd:.2f} USD per million generated tokens" if usd is not None else "unknown"
    if found["usd_per_hour"] is None:
        price = "unknown: set FORGE_USD_PER_HOUR to the machine's price"
    rows += [
        ("up for", format_duration(found["uptime_s"])),
        ("replicas", str(found["replicas"])),
        ("requests", f"{found['running']} running, {found['waiting']} waiting"),
        (
            "tokens",
            f"{format_count(found['prompt_tokens'])} read, {format_count(found['completion_tokens'])} generated",
        ),
        ("speed", speed),
        ("cost", price),
    ]
    return [row for row in rows if row[1]]
