"""`forge train` and `forge plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli.launch import BillRequest, Request, launch, run_arguments, show_dry
from forge.cli.options import (
    ClusterOption,
    DetachOption,
    DryRunOption,
    Output,
    OutputOption,
    ResumableJobArgument,
    SetOption,
    YesOption,
)
from forge.cli.scaling import (
    BudgetOption,
    CandidatesOption,
    FlopsOption,
    GpuOption,
    HoursOption,
    InferenceTokensOption,
    LawOption,
    NumGpusOption,
    OptionalJobArgument,
    RefreshOption,
    RegionOption,
    SizingClusterOption,
    SizingRequest,
    SpotOption,
    TraceOption,
    WriteOption,
    plan_size,
)


def train(
    file: ResumableJobArgument = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Resume this run (or: latest) from its newest checkpoint.")
    ] = None,
    cluster: ClusterOption = None,
    detach: DetachOption = False,
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Train the model of a job file: plan, show the plan, start the run and follow it.

    Example:  forge train jobs/pretrain.yaml --set training.total_steps=50
    """
    launch(
        Request(
            file=file,
            overrides=overrides or [],
            is_search=False,
            dry_run=dry_run,
            resume=resume,
            cluster=cluster,
            detach=detach,
            yes=yes,
            output=output,
        )
    )


def plan(
    file: OptionalJobArgument = None,
    overrides: SetOption = None,
    budget: BudgetOption = None,
    flops: FlopsOption = None,
    hours: HoursOption = None,
    inference_tokens: InferenceTokensOption = None,
    law: LawOption = None,
    gpu: GpuOption = None,
    gpus: NumGpusOption = None,
    spot: SpotOption = False,
    region: RegionOption = None,
    cluster: SizingClusterOption = None,
    write: WriteOption = None,
    candidates: CandidatesOption = None,
    trace: TraceOption = None,
    refresh: RefreshOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a job will do and cost: batch, memory, FLOPs, time, and USD on rented GPUs. Starts nothing.

    The cost is that of each offer of the clouds, on demand and as spot, in the numbers of machines that
    resources.workers allows; resources.max_hours and resources.max_usd choose among them.

    With --budget, --flops or --hours: choose the size of the model and its number of tokens by scaling laws, show
    what that gives, and write the job file. FILE, if given, has the data and everything else.

    Example:  forge plan jobs/pretrain.yaml -o json

    Example:  forge plan jobs/pretrain.yaml --candidates 20 --trace spot.csv

    Example:  forge plan --budget 5000usd
    """
    request = SizingRequest(
        file=file,
        overrides=overrides or [],
        budget=budget,
        flops=flops,
        hours=hours,
        inference_tokens=inference_tokens,
        law=law,
        gpu=gpu,
        num_gpus=gpus,
        spot=spot,
        region=region,
        cluster=cluster,
        write=write,
        num_candidates=candidates,
        trace=trace,
        refresh=refresh,
        output=output,
    )
    if request.is_given:
        plan_size(request)
        return
    if file is None:
        raise typer.BadParameter("give a job file, or --budget, --flops or --hours", param_hint="FILE")
    from forge.config.load import load_job

    show_dry(
        load_job(file, overrides=overrides or []),
        arguments=run_arguments(file, overrides or []),
        output=output,
        bill=BillRequest(
            num_candidates=candidates,
            trace=trace,
            refresh=refresh,
            gpu=gpu,
            region=region,
            spot=spot,
            cluster=cluster,
        ),
    )
