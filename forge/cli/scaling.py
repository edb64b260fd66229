"""`forge scaling`, and `forge plan` with a limit instead of a size: which model a budget buys."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli.options import Output, OutputOption, RunsOption

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forge.plan.machines import Machines
    from forge.plan.scaling import ModelScale, ScalingLaw
    from forge.plan.sizing import Limit
    from forge.pricing.offer import Offer

_MOST_HOURS = 1_000_000
_PANEL, _MACHINES = "Size from a limit", "Machines"


def _option(*names: str, metavar: str | None = None, help: str, panel: str = _PANEL) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


def _num_candidates(text: str) -> int:
    """Parse a count of candidates; `all` is more than there can be."""
    if text == "all":
        return sys.maxsize
    if not text.isascii() or not text.isdigit() or not int(text):
        raise typer.BadParameter(f"{text!r} is neither a count, at least 1, nor all")
    return int(text)


OptionalJobArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="The job file; not needed with --budget, --flops or --hours."),
]
BudgetOption = Annotated[str | None, _option("--budget", metavar="USD", help="Most to spend, as in 5000usd.")]
FlopsOption = Annotated[str | None, _option("--flops", metavar="FLOPS", help="FLOPs of training, as in 1e21.")]
HoursOption = Annotated[
    str | None, _option("--hours", metavar="TIME", help="Longest training, as in 24h or 24; needs the GPUs.")
]
InferenceTokensOption = Annotated[
    str | None,
    _option("--inference-tokens", metavar="COUNT", help="Tokens the model will process; more: a smaller model."),
]
LawOption = Annotated[
    Path | None, _option("--law", metavar="FILE", help="Law of your own runs, written by forge scaling.")
]
GpuOption = Annotated[
    str | None, _option("--gpu", metavar="NAME", help="GPU to train on, as in H100.", panel=_MACHINES)
]
NumGpusOption = Annotated[int | None, _option("--gpus", metavar="COUNT", help="How many GPUs.")]
RegionOption = Annotated[
    str | None,
    _option("--region", metavar="NAME", help="Part of the world (eu, us, asia), or a region.", panel=_MACHINES),
]
SpotOption = Annotated[bool, _option("--spot", help="At spot prices only.", panel=_MACHINES)]
SizingClusterOption = Annotated[
    str | None,
    _option("--cluster", metavar="NAME", help="Cluster, or its file, with the GPUs to train on.", panel=_MACHINES),
]
CandidatesOption = Annotated[
    int | None,
    typer.Option(
        "--candidates",
        metavar="COUNT",
        parser=_num_candidates,
        help="List so many machines, the cheapest first, or all.",
        rich_help_panel=_MACHINES,
    ),
]
TraceOption = Annotated[
    Path | None,
    _option("--trace", metavar="FILE", help="Interruptions of spot machines as in this trace.", panel=_MACHINES),
]
RefreshOption = Annotated[
    bool, _option("--refresh", help="Ask the clouds for their prices of today.", panel=_MACHINES)
]
WriteOption = Annotated[
    Path | None, _option("--write", metavar="FILE", help="The job file to write; by default NAME-SIZE.yaml.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingRequest:
    """The options of `forge plan` that choose a size."""

    file: Path | None
    overrides: list[str]
    budget: str | None
    flops: str | None
    hours: str | None
    inference_tokens: str | None
    law: Path | None
    gpu: str | None
    num_gpus: int | None
    spot: bool
    region: str | None
    cluster: str | None
    write: Path | None
    num_candidates: int | None
    trace: Path | None
    refresh: bool
    output: Output

    @property
    def is_given(self) -> bool:
        """Whether a size is to be chosen; the other options also choose the machines of a bill."""
        others = (self.inference_tokens, self.law, self.num_gpus, self.write)
        return any(value is not None for value in (self.budget, self.flops, self.hours, *others))


def plan_size(request: SizingRequest) -> None:
    """Choose a model and its tokens for a limit, show it, and write its job file.

    Raises: PlanError if nothing keeps to the limit; ArgumentError for a file that may not be overwritten;
        JobFileError for a wrong job or cluster file.
    """
    from forge.cli import display
    from forge.cli.scaling_table import show_sizing, sizing_notes, sizing_record
    from forge.config.dump import dump_plain
    from forge.plan.scaling import BESIROGLU
    from forge.plan.sized_job import job_comment, left_out_note, require_sizable, sized_job, vocab_size_of
    from forge.plan.sizing import Goal, patient_run
    from forge.runs.scaling_runs import read_law

    _require_effect(request)
    base = _base_job(request)
    require_sizable(base)
    vocab_size = vocab_size_of(base)
    goal = Goal(
        limit=_limit(request),
        law=read_law(request.law).law if request.law else BESIROGLU,
        inference_tokens=_count(request.inference_tokens or "0", option="--inference-tokens"),
        seq_len=int(base["data"]["seq_len"]),
        vocab_size=vocab_size,
    )
    ladders, notes = _machines(request)
    run = patient_run(goal, ladders)
    path = request.write or Path(f"{sized_job(run, base=base)['name']}.yaml")
    text = job_comment(run) + dump_plain(sized_job(run, base=base))
    is_replaced = _write_job(path, text)
    notes += sizing_notes(run)
    notes += [note] if (note := left_out_note(base)) is not None else []
    if request.output is Output.JSON:
        display.print_json(sizing_record(run, notes=notes) | {"job_file": str(path)})
    else:
        show_sizing(run, notes=notes)
    display.message(f"{'replaced' if is_replaced else 'wrote'} {path}")
    display.next_command(f"forge plan {path}", purpose="plan it")


def scaling(
    fit: Annotated[
        Path, typer.Argument(metavar="FIT", help="The file of the law: written if RUNS are given, else read.")
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Finished runs to fit: ids, folders or unique prefixes."),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Predict the loss of a model of this size, with --tokens.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="COUNT", help="Tokens of the prediction.")] = None,
    flops: Annotated[
        str | None, typer.Option(metavar="FLOPS", help="Predict the best model for so many FLOPs.")
    ] = None,
    runs: RunsOption = Path("runs"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Fit a scaling law to your own small runs, and say what the next size would reach.

    Example:  forge scaling law.yaml ladder-1 ladder-2 ladder-3 ladder-4 ladder-5
    """
    from forge.cli import display
    from forge.cli.scaling_table import prediction, show_law
    from forge.plan.scaling_fit import check_held_out, fit_law, fit_warnings, next_scale
    from forge.runs.scaling_runs import LawFile, read_law, read_points, write_law

    notes: tuple[str, ...] = ()
    if names:
        found = read_points(names, root=runs)
        law_file = LawFile(law=fit_law(found.points), runs=found.points)
        write_law(fit, law_file.law, runs=law_file.runs)
        notes = found.notes
        display.message(f"wrote {fit}")
    else:
        law_file = read_law(fit)
    points = law_file.runs
    scales = {"next size": next_scale(points)} if len(points) > 1 else {}
    scales |= _asked_scales(law_file.law, parameters=parameters, tokens=tokens, flops=flops)
    checked = check_held_out(points)
    notes += fit_warnings(points) if points else ()
    if output is Output.JSON:
        display.print_json(
            {
                "law": asdict(law_file.law),
                "runs": [asdict(point) | {"predicted": law_file.law.loss(point.scale)} for point in points],
                "held_out": asdict(checked) | {"error": checked.error} if checked else None,
                "predictions": {name: prediction(law_file.law, scale) for name, scale in scales.items()},
                "notes": notes,
            }
        )
        return
    show_law(law_file, scales=scales)
    if checked is not None:
        display.message(
            f"fitted to the others, the law predicts {checked.predicted:.3f} for {checked.name}, which reached "
            f"{checked.measured:.3f}: {abs(checked.error):.1%} off"
        )
    for note in notes:
        display.warning(note)
    display.next_command(f"forge plan --law {fit} --budget 100usd", purpose="size a model by it")


def _require_effect(request: SizingRequest) -> None:
    """Raises: BadParameter for an option that would be ignored."""
    size = "a size is chosen first; give it to `forge plan` of the job file that is written"
    ignored = {
        "--candidates": (request.num_candidates, size),
        "--trace": (request.trace, size),
        "--set": (request.overrides and request.file is None, "there is no job FILE whose keys it overrides"),
    }
    for name, (is_given, reason) in ignored.items():
        if is_given:
            raise typer.BadParameter(reason, param_hint=name)


def _base_job(request: SizingRequest) -> Mapping[str, Any]:
    from forge.config.load import load_job
    from forge.config.templates import with_templates
    from forge.plan.sized_job import BASE_JOB

    if request.file is None:
        return BASE_JOB
    loaded = load_job(request.file, overrides=request.overrides)
    body = loaded.job.model_dump(mode="json", exclude_unset=True)
    body["data"]["seq_len"] = loaded.job.data.seq_len
    written: Mapping[str, Any] = with_templates(body, loaded.templates)
    return written


def _limit(request: SizingRequest) -> Limit:
    from forge.plan.sizing import Limit

    given = {"--budget": request.budget, "--flops": request.flops, "--hours": request.hours}
    chosen = [(name, text) for name, text in given.items() if text is not None]
    if len(chosen) != 1:
        names = " and ".join(name for name, _ in chosen)
        others = {
            "--inference-tokens": request.inference_tokens,
            "--law": request.law,
            "--gpus": request.num_gpus,
            "--write": request.write,
        }
        alone = next((name for name, value in others.items() if value is not None), "")
        problem = f"{names} were given; " if chosen else f"{alone} is for choosing a size; "
        raise typer.BadParameter(f"{problem}give one of --budget, --flops and --hours", param_hint="--budget")
    name, text = chosen[0]
    if name == "--budget":
        return Limit(kind="usd", amount=_number(text.lower().removesuffix("usd").replace("$", ""), option=name))
    if name == "--flops":
        return Limit(kind="flops", amount=_number(text, option=name))
    if (request.gpu is None or request.num_gpus is None) and request.cluster is None:
        raise typer.BadParameter("hours of which GPUs? Give --gpu and --gpus, or --cluster", param_hint="--hours")
    return Limit(kind="hours", amount=_hours(text))


def _number(text: str, *, option: str) -> float:
    import math

    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = math.nan
    example, unit, most = {"--budget": ("5000usd", "USD", 1e12), "--flops": ("1e21", "FLOPs", 1e30)}[option]
    if not 0 < value <= most:
        problem = f"{text!r} is not a positive number of {unit} up to {most:g}, as in {example}"
        raise typer.BadParameter(problem, param_hint=option)
    return value


def _hours(text: str) -> float:
    from forge.units import parse_duration_s

    try:
        hours = parse_duration_s(text if not text.replace(".", "", 1).isdigit() else f"{text}h") / 3600
        if hours > _MOST_HOURS:
            raise ValueError(f"is longer than {_MOST_HOURS:,} hours")
        return hours
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}", param_hint="--hours") from error


def _count(text: str, *, option: str) -> int:
    from forge.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}", param_hint=option) from error


def _machines(request: SizingRequest) -> tuple[list[list[Machines]], list[str]]:
    """Machines to choose from, and where their prices come from."""
    from forge.config.section import MAX_WORKERS
    from forge.plan.machines import offered_machines
    from forge.pricing.choose import OfferFilter, find_offers
    from forge.pricing.offers import load_offers

    if request.num_gpus is not None and not 1 <= request.num_gpus <= MAX_WORKERS:
        problem = "must be at least 1" if request.num_gpus < 1 else f"must be at most {MAX_WORKERS:,}, one a worker"
        raise typer.BadParameter(problem, param_hint="--gpus")
    table = load_offers(refresh=request.refresh)
    notes = list(table.notes)
    if request.cluster is not None:
        if any((request.gpu, request.num_gpus, request.region)):
            raise typer.BadParameter("the file has --gpu, --gpus and --region", param_hint="--cluster")
        return _cluster_machines(request.cluster, offers=table.offers, spot=request.spot), notes
    wanted = OfferFilter(gpu=request.gpu, spot=request.spot, region=request.region)
    found = find_offers(table.offers, wanted=wanted)
    return offered_machines(found, spot=request.spot, num_gpus=request.num_gpus), notes


def _cluster_machines(name: str, *, offers: Sequence[Offer], spot: bool) -> list[list[Machines]]:
    """All workers of a cluster that was started from here, or of a file.

    Raises: ArgumentError if it does not name their GPUs.
    """
    from forge.cluster.registry import cluster_spec
    from forge.config.cluster import CloudSpec, KubernetesSpec
    from forge.errors import ArgumentError
    from forge.plan.gpus import find_gpu
    from forge.plan.machines import Machines, interconnect, offered_machines
    from forge.pricing.choose import OfferFilter, cluster_offers, find_offers

    spec = cluster_spec(name)
    gpu = find_gpu(spec.gpu) if isinstance(spec, (CloudSpec, KubernetesSpec)) else None
    if gpu is None or not isinstance(spec, (CloudSpec, KubernetesSpec)):
        raise ArgumentError(f"{name} names no GPU that forge knows; give --gpu and --gpus instead")
    count = max(1, spec.workers.high)
    if isinstance(spec, KubernetesSpec):
        machines = Machines(
            name=f"{count} workers of {spec.name} with {spec.gpus_per_worker} {gpu.name}",
            gpu=gpu,
            num_gpus=count * spec.gpus_per_worker,
            interconnect=interconnect(gpus_per_node=spec.gpus_per_worker, gbps=None),
            usd_per_hour=None,
        )
        return [[machines]]
    spot = spot or spec.spot
    allowed = cluster_offers(spec, offers)
    found = find_offers(allowed, wanted=OfferFilter(gpu=spec.gpu, spot=spot))
    return offered_machines(found, spot=spot, num_machines=count)


def _write_job(path: Path, text: str) -> bool:
    """Write the file, and return whether another one of `forge plan` was there."""
    from forge.errors import ArgumentError
    from forge.fs import write_atomic
    from forge.plan.sized_job import HEADER

    try:
        former = path.read_text(errors="replace") if path.exists() else text
        if not former.startswith(HEADER):
            raise ArgumentError(f"{path} exists and was not written by forge plan; give another --write FILE")
        write_atomic(path, text)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror}") from error
    return former != text


def _asked_scales(
    law: ScalingLaw, *, parameters: str | None, tokens: str | None, flops: str | None
) -> dict[str, ModelScale]:
    from forge.plan.scaling import ModelScale

    if (parameters is None) != (tokens is None):
        raise typer.BadParameter("--parameters and --tokens go together", param_hint="--parameters")
    scales = {}
    if parameters is not None and tokens is not None:
        num_parameters = _count(parameters, option="--parameters")
        num_tokens = _count(tokens, option="--tokens")
        if min(num_parameters, num_tokens) < 1:
            raise typer.BadParameter("must be at least 1", param_hint="--parameters")
        scales["asked for"] = ModelScale(num_parameters=num_parameters, num_tokens=num_tokens)
    if flops is not None:
        scales[f"best for {flops} FLOPs"] = law.best_scale(_number(flops, option="--flops"))
    return scales
