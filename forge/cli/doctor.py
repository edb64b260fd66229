"""`forge doctor`: check this machine, and print the command that fixes each problem."""

from __future__ import annotations

import typer

from forge.cli.options import Output, OutputOption


def doctor(output: OutputOption = Output.TABLE) -> None:
    """Check what this machine can do. Exit code 2 if training cannot work on it.

    Example:  forge doctor
    """
    from dataclasses import asdict

    from forge.cli import display
    from forge.runtime.doctor import examine

    findings = examine()
    broken = [finding for finding in findings if finding.state == "broken"]
    if output is Output.JSON:
        display.print_json([asdict(finding) for finding in findings])
    else:
        display.table(["", "what", "found"], [[f.state, f.what, f.found] for f in findings])
        for finding in findings:
            if finding.remedy:
                display.next_command(finding.remedy, purpose=f"fix {finding.what}")
        if not broken:
            display.next_command("forge train jobs/pretrain.yaml", purpose="ready; start a run")
    if broken:
        raise typer.Exit(2)
