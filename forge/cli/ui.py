"""`forge ui`: all runs of a folder or a cluster, live, in a browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

_PORT = 8400


def ui(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds the runs.")] = Path(
        "runs"
    ),
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only the runs on this cluster, from any folder.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; one that other machines reach needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = _PORT,
    token: Annotated[
        bool, typer.Option("--token", help="Also need a token on this machine, where other users could connect.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name that browsers reach this server by.", show_default=False),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A certificate, for https.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key.", show_default=False)
    ] = None,
) -> None:
    """Show all runs of a folder in a browser, live, until Ctrl-C.

    Other machines need the token: that of FORGE_UI_TOKEN, else a new one, which is printed.

    Example:  forge ui runs --port 8400
    """
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.ui.server import require_packages, serve

    require_packages()
    from forge.serve.http.api_keys import new_key
    from forge.serve.http.settings import is_loopback, listen_on, require_certificate
    from forge.ui.access import TOKEN_VARIABLE

    if cluster is None and not folder.is_dir():
        raise ArgumentError(f"{folder.absolute()} is no folder; start a run: forge train jobs/pretrain.yaml")
    require_certificate(tls_cert, tls_key)
    given = os.environ.pop(TOKEN_VARIABLE, "").strip() or None
    is_needed = token or given is not None or not is_loopback(host)
    chosen = (given or new_key()) if is_needed else None
    with listen_on(host, port) as listener:
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host.strip("[]"), host.strip("[]"))
        shown = f"[{shown}]" if ":" in shown else shown
        url = f"{'http' if tls_cert is None else 'https'}://{shown}:{listener.getsockname()[1]}"
        if chosen is not None:
            url += "/login" if given is not None else f"/login#{chosen}"

        def on_ready() -> None:
            what = str(folder.absolute()) if cluster is None else f"the cluster '{cluster}'"
            display.message(f"showing the runs of {what} at {url}")
            if not is_loopback(host) and tls_cert is None:
                display.warning("without --tls-cert the token and the pages travel unencrypted")
            display.message("Ctrl-C ends it; the runs go on")

        serve(
            listener, folder, host=host, token=chosen, more_hosts=tuple(allow_host or ()), cluster=cluster,
            tls_cert=tls_cert, tls_key=tls_key, on_ready=on_ready,
        )  # fmt: skip
