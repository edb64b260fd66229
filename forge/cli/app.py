"""The command `forge`: one module per noun, and the only place where errors become exit codes.

0 done; 2 the user's input; 3 the cluster; 4 the run; 130 interrupted; 141 the reader of stdout closed the pipe.
Nothing heavy is imported before a command needs it, so that `forge --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from forge.cli import (
    chaos,
    checkpoints,
    cluster,
    data,
    doctor,
    eval,
    generate,
    prices,
    runs,
    scaling,
    schema,
    serve,
    train,
    tune,
    ui,
)
from forge.cli.follow import INTERRUPTED
from forge.environment import adopt_environment, run_in_utf8
from forge.errors import ForgeError

_PIPE_CLOSED = 141


class HarmlessGroup(TyperGroup):
    """Prints usage errors, which quote the arguments of the command line, without their control characters."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **options)
        try:
            code = super().main(args, standalone_mode=False, **options)
        except typer.Abort:  # Ctrl-C or the end of stdin at a question
            sys.exit(INTERRUPTED)
        except TyperException as error:
            from forge.cli import display

            text = io.StringIO()
            error.show(file=text)  # type: ignore[attr-defined]
            sys.stderr.write(display.harmless(text.getvalue()))
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="forge",
    cls=HarmlessGroup,
    help="Train large models on machines that can be preempted.",
    epilog="Start here:  forge train jobs/pretrain.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("tune")(tune.tune)
app.command("plan")(train.plan)
app.command("prices")(prices.prices)
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.add_typer(checkpoints.app, name="checkpoints")
app.command("eval")(eval.evaluate)
app.command("generate")(generate.generate)
app.add_typer(serve.app, name="serve")
app.command("scaling")(scaling.scaling)
app.add_typer(cluster.app, name="cluster")
app.add_typer(chaos.app, name="chaos")
app.command("ui")(ui.ui)
app.command("doctor")(doctor.doctor)
app.add_typer(schema.app, name="schema")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print forge's version."),
) -> None:
    if version:
        from importlib.metadata import version as version_of

        sys.stdout.write(f"forge {version_of('forge-train')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def main() -> None:
    """Run the command line; the entry point of `forge`."""
    run_in_utf8()
    adopt_environment()
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        code = _PIPE_CLOSED
    if code == _PIPE_CLOSED:
        # The reader closed the pipe, as in `forge runs list | head -1`; discard the rest of stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except ForgeError as error:
        from forge.cli import display

        display.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # typer exits with 1 if a pipe is closed, and in no other case that forge reaches.
        return _PIPE_CLOSED if end.code == 1 else int(end.code or 0)
    return 0


if __name__ == "__main__":
    main()
