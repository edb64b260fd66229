"""`forge doctor`: what this machine can do, and what is missing, with the command that mends it."""

from __future__ import annotations

import typer

from forge.cli.options import Output, OutputOption


def doctor(output: OutputOption = Output.TABLE) -> None:
    """Check this machine. Leaves with 2 if training cannot work here.

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
                display.next_command(finding.remedy, purpose=f"mend {finding.what}")
        if not broken:
            display.next_command("forge train jobs/pretrain.yaml", purpose="ready; train something")
    if broken:
        raise typer.Exit(2)
