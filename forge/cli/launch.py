"""`forge train` and `forge tune`: check the request, show the plan, start the run with `forge.api`, follow it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from forge.cli.follow import Past, conclude, follow_run, handle, past_of, print_record
from forge.cli.options import Output

if TYPE_CHECKING:
    from forge.config.load import LoadedJob
    from forge.plan.bill import Bill, BillScope
    from forge.plan.plan import DraftPlan, Plan
    from forge.remote.submit import RemoteTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of `forge train` or `forge tune`."""

    file: Path | None
    overrides: list[str]
    is_search: bool
    dry_run: bool
    resume: str | None
    cluster: str | None
    detach: bool
    yes: bool
    output: Output


@dataclass(frozen=True, slots=True, kw_only=True)
class BillRequest:
    """The options of `forge plan` on the cost of a job."""

    num_candidates: int | None = None
    trace: Path | None = None
    refresh: bool = False
    gpu: str | None = None
    region: str | None = None
    spot: bool = False
    cluster: str | None = None

    def scope(self) -> BillScope:
        """Which machines are priced. Raises: ArgumentError for a cluster that is not rented."""
        from forge.cluster.registry import cluster_spec
        from forge.config.cluster import CloudSpec
        from forge.errors import ArgumentError
        from forge.plan.bill import BillScope
        from forge.pricing.choose import OfferFilter

        wanted = OfferFilter(gpu=self.gpu, region=self.region)
        if self.cluster is None:
            return BillScope(wanted=wanted, is_spot=True if self.spot else None)
        spec = cluster_spec(self.cluster)
        if not isinstance(spec, CloudSpec):
            instead = f"forge train --cluster {self.cluster} shows what a run costs on it"
            raise ArgumentError(f"'{spec.name}' rents no machines; {instead}")
        return BillScope(wanted=wanted, is_spot=spec.spot, cluster=spec)


def launch(request: Request) -> None:
    """Start or resume a run or a search, and follow it unless it is detached.

    Raises: JobFileError for a job of the other kind, and what `forge.api.start` raises.
    """
    from forge import api
    from forge.cli import display
    from forge.cli.progress import PrepareScreen
    from forge.config.overrides import check_kind
    from forge.runs.create import require_regular
    from forge.runs.reader import read_plan, read_run
    from forge.runtime.resolve import with_data_folder
    from forge.runtime.resolve_code import with_run_code
    from forge.runtime.resolve_init import with_init

    if request.file is None and request.resume is None:
        name = "SEARCH" if request.is_search else "RUN"
        raise typer.BadParameter(f"give a job file, or --resume {name}", param_hint="FILE")
    resumed = _find_resumable(request) if request.resume is not None else None
    job_file = request.file or Path(resumed or ".") / "job.yaml"
    if resumed is not None:
        _compare(resumed, request, job_file)
    if request.file is None:
        require_regular(job_file)
    if resumed is not None and not request.dry_run and _is_finished(resumed, request, job_file):
        ended = read_run(resumed)
        last = f"stopped early at step {ended.step}" if ended.is_stopped_early else "reached its last step"
        done = "completed all its trials" if request.is_search else last
        display.message(f"{resumed.name} has already {done}")
        conclude(resumed, interrupted=False, output=request.output)
        return
    loaded = with_init(api.load_job(job_file, request.overrides), resume=resumed)
    if resumed is not None:
        loaded = with_data_folder(with_run_code(loaded, run_folder=resumed), run_folder=resumed)
    check_kind(loaded, is_search=request.is_search)
    if request.dry_run:
        arguments = run_arguments(request.file, request.overrides, cluster=request.cluster, resume=request.resume)
        show_dry(loaded, arguments=arguments, output=request.output, resumed=resumed)
        return
    past = Past(events=(), steps=()) if resumed is None else past_of(resumed)
    with PrepareScreen() as preparing:

        def on_plan(plan: Plan, target: RemoteTarget | None) -> None:
            preparing.clear()
            confirm_plan(plan, target, request)

        run = api.start(
            loaded, cluster=request.cluster, resume=resumed, on_progress=preparing.show, on_plan=on_plan
        )
    folder = run.folder
    display.message(f"{'search' if request.is_search else 'run'} {folder.name} in {folder}")
    if request.detach:
        if request.output is Output.JSON:
            print_record(read_run(folder))
        display.next_command(f"forge runs watch {handle(folder)}", purpose="follow it")
        return
    interrupted = follow_run(run, read_plan(folder), past=past)
    conclude(folder, interrupted=interrupted, output=request.output, past_events=len(past.events))


def run_arguments(
    file: Path | None, overrides: Sequence[str], *, cluster: str | None = None, resume: str | None = None
) -> str:
    """The arguments of `forge train` that run what was planned, quoted for a shell."""
    words = [str(file)] if file is not None else []
    words += ["--resume", resume] if resume is not None else []
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--cluster", cluster] if cluster is not None else []
    return shlex.join(words)


def show_dry(
    loaded: LoadedJob,
    *,
    arguments: str,
    output: Output,
    resumed: Path | None = None,
    bill: BillRequest | None = None,
) -> None:
    """Show the plan of a job, and what it costs on rented GPUs; nothing is started.

    Args:
        arguments: of the command that runs it.
        resumed: the folder of the run that it would resume.
    """
    import json

    from forge import api
    from forge.cli import display
    from forge.cli.bill_table import bill_record
    from forge.cli.plan_table import show_plan, show_warnings
    from forge.cli.progress import PrepareScreen
    from forge.plan.plan import plan_to_json
    from forge.runs.create import resumed_plan

    bill = bill or BillRequest()
    with PrepareScreen() as screen:
        plan = api.plan_job(loaded, on_progress=screen.show)
    if resumed is not None:
        plan = resumed_plan(resumed, plan)
    priced = api.price_job(plan, scope=bill.scope(), refresh=bill.refresh, trace=bill.trace)
    if output is Output.JSON:
        record = json.loads(plan_to_json(plan, is_file=True))
        cost = None if priced is None else bill_record(priced, num_candidates=bill.num_candidates)
        display.print_json(record | {"bill": cost})
        return
    show_plan(plan)
    show_warnings(plan)
    _show_cost(plan, priced, num_rows=bill.num_candidates)
    if plan.search is None:
        display.next_command(f"forge train {arguments}", purpose="train it")
    else:
        display.next_command(f"forge tune {arguments}", purpose="search")


def _show_cost(plan: DraftPlan, priced: Bill | None, *, num_rows: int | None) -> None:
    from forge.cli import display
    from forge.cli.bill_table import show_bill

    _show_own_cost(plan)
    if priced is None:
        display.message("resources.gpu: none is not priced on rented machines")
        return
    what = "each trial on rented GPUs" if plan.search is not None else "on rented GPUs"
    show_bill(priced, title=what, num_rows=num_rows)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before money is spent, unless `--yes` was given.

    Raises: ArgumentError without a terminal to ask on; typer.Exit with code 2 if the answer is no.
    """
    from forge.errors import ArgumentError

    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ArgumentError("refusing to spend money without confirmation; pass --yes")
    if not typer.confirm(question, err=True):
        raise typer.Exit(2)


def confirm_plan(plan: Plan, target: RemoteTarget | None, request: Request) -> None:
    """Show the plan and what it costs; on a cluster that costs money, ask."""
    from forge.cli import display
    from forge.cli.plan_table import show_plan, show_warnings

    show_plan(plan, to_stderr=request.output is Output.JSON)
    show_warnings(plan)
    if target is None:
        _show_own_cost(plan)
        return
    price = target.cluster.price()
    if price is not None:
        _show_cluster_cost(plan)
        display.message(f"the cluster '{target.cluster.name}' costs up to {price:.2f} USD an hour")
        confirm("Start the run?", yes=request.yes)
    display.message(f"sending the run to the cluster '{target.cluster.name}'")


def _show_own_cost(plan: DraftPlan) -> None:
    """Show what a run on this machine costs: nothing, unless the environment has its price."""
    from forge.cli import display
    from forge.pricing.budget import PRICE_VARIABLE, read_price

    price = read_price(os.environ)
    if price is None:
        display.message("cost: nothing is rented, it runs on this machine")
    else:
        _show_cluster_cost(plan)
        display.message(f"this machine costs {price:.2f} USD an hour, by {PRICE_VARIABLE}")


def _show_cluster_cost(plan: DraftPlan) -> None:
    from forge.cli import display
    from forge.cli.bill_table import range_text

    cost = plan.forecast.cost if plan.forecast is not None else None
    if cost is None:
        display.message("cost: unknown, because it is not known how long the run takes")
        return
    usd, hours = range_text(cost.usd, unit="USD"), range_text(cost.hours, unit="h")
    display.message(f"cost: {usd} in {hours}, on {cost.machines}")
    resources = plan.job.resources
    if resources.max_usd is not None and cost.usd.likely > resources.max_usd:
        share = resources.max_usd / cost.usd.likely
        display.warning(f"resources.max_usd: {resources.max_usd:g} will stop it at about {share:.0%} of its steps")
    if resources.max_hours is not None and cost.hours.likely > resources.max_hours:
        display.warning(f"it is likely to take longer than resources.max_hours: {resources.max_hours:g}")


def _find_resumable(request: Request) -> Path:
    from forge.config.load import load_job
    from forge.errors import ArgumentError
    from forge.runs.lock import driver_pid
    from forge.runs.reader import find_run, read_plan, search_folder

    job_file, name = request.file, request.resume or ""
    root = Path(load_job(job_file, overrides=request.overrides).job.checkpoint.runs) if job_file else Path("runs")
    folder = find_run(name, root=root, is_search=request.is_search)
    search = search_folder(folder)
    if search is not None:
        raise ArgumentError(
            f"{folder.name} is a trial and cannot be resumed alone; resume its search: "
            f"forge tune --resume {handle(search)}"
        )
    is_search = read_plan(folder).search is not None
    if is_search != request.is_search:
        kind, verb = ("a search", "tune") if is_search else ("not a search", "train")
        raise ArgumentError(f"{folder.name} is {kind}; resume it with: forge {verb} --resume {handle(folder)}")
    pid = driver_pid(folder)
    if pid is not None:
        raise ArgumentError(
            f"{folder.name} is still running, in process {pid}; watch it: forge runs watch {handle(folder)}"
        )
    return folder


def _compare(folder: Path, request: Request, job_file: Path) -> None:
    """Say what a job file and `--set` change of a run that is resumed. Raises: ArgumentError if they may not."""
    from forge.cli import display
    from forge.config.load import load_job
    from forge.plan.curve import free_differences
    from forge.runs.create import require_same_curve
    from forge.runs.reader import read_plan
    from forge.runtime.resolve_init import with_init

    if request.file is None and not request.overrides:
        return
    before = read_plan(folder).job
    now = with_init(load_job(job_file, overrides=request.overrides), resume=folder).job
    require_same_curve(folder, before, now)
    for difference in free_differences(before, now):
        display.message(f"{folder.name}: {difference}")


def _is_finished(folder: Path, request: Request, job_file: Path) -> bool:
    """Whether a run is at its last step, also of the length that is requested now; a search also has to have as
    many trials."""
    from forge.config.load import load_job
    from forge.plan.lengths import is_same_length
    from forge.plan.search import count_trials
    from forge.runs.reader import read_run
    from forge.runs.trials import TrialTable

    run = read_run(folder)
    if run.status != "finished":
        return False
    job = load_job(job_file, overrides=request.overrides).job
    if not request.is_search:
        return is_same_length(run.plan.job, job)
    search = job.search
    return search is not None and count_trials(search) <= len(TrialTable(run.events).trials)
