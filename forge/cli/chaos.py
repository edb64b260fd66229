"""`forge chaos`: what spot machines do to a run, done on purpose, and what it cost."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from forge.cli.options import Output, OutputOption, RunArgument, RunsOption, SetOption

app = typer.Typer(
    help="Break a run on purpose, and see what it costs.", no_args_is_help=True, rich_markup_mode=None
)

_RUNS = Path("runs")
_RankOption = Annotated[int | None, typer.Option("--rank", min=0, help="The process of this rank.")]
_NodeOption = Annotated[
    str | None, typer.Option("--node", help="A whole machine: its number in the order of joining, or its id.")
]


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A recorded spot trace; - for stdin.")],
    job: Annotated[Path, typer.Option("--job", metavar="FILE", help="The job file.")],
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Simulated machines at most; the trace is scaled.")] = 4,
    speed: Annotated[float, typer.Option(min=0.01, help="How much faster than the trace.")] = 1.0,
    notice: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds between the notice of a machine's end and its end.")
    ] = None,
    overrides: SetOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Train a job on simulated machines that come and go as in a spot trace.

    Example:  forge chaos replay trace.csv --job jobs/pretrain.yaml --nodes 4 --speed 10 -o json
    """
    from forge.cli import display
    from forge.cluster.local.ray_cluster import require_private_token

    require_private_token()  # before Ray is imported
    from forge.chaos.replay import replay as play
    from forge.chaos.trace import faster
    from forge.chaos.trace_file import read_trace
    from forge.chaos.trace_scale import scale
    from forge.config.load import load_job
    from forge.runs.goodput import goodput_of
    from forge.runs.reader import read_metrics, read_run
    from forge.runtime.resolve import resolve

    schedule = faster(scale(read_trace(_path_of(trace)), num_nodes=nodes), speed=speed)
    loaded = load_job(job, overrides=[*(overrides or []), f"resources.workers=1..{nodes}"])
    with display.PrepareScreen() as preparing:
        plan = resolve(loaded, on_progress=preparing.show)
    display.message(
        f"{len(schedule.changes)} changes in {schedule.duration_s:.0f} s, up to {schedule.max_nodes} nodes at once"
    )
    # The simulated cluster is nobody else's: a run's process finds it by this folder.
    with tempfile.TemporaryDirectory(prefix="forge-chaos-") as state:
        os.environ["FORGE_STATE"] = state
        with display.TrainScreen(plan, losses=[]) as screen:
            result = play(schedule, plan, notice_s=notice, on_record=screen.show)
    if output is Output.JSON:
        display.print_json(result)
        return
    found = read_run(Path(result["folder"]))
    ledger = goodput_of(found.events, read_metrics(found.folder), now=None)
    display.show_ledger(ledger, started=found.started)
    for problem in result["problems"]:
        display.warning(problem)
    display.message(
        f"{result['num_removed']} machines lost and {result['num_added']} added; {result['steps']} steps, "
        f"{result['samples_per_s']:.1f} samples a second in all"
    )
    display.next_command(f"forge runs show {result['folder']}", purpose="look at the run")


@app.command()
def poisson(
    mtbf: Annotated[float, typer.Option(min=0.001, help="Mean seconds until a machine is lost.")],
    down: Annotated[float, typer.Option(min=0.0, help="Seconds until it is back.")] = 60.0,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 4,
    duration: Annotated[float, typer.Option(min=0.001, help="Seconds.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of the chance.")] = 0,
) -> None:
    """Make a trace of machines that are lost at random, for `forge chaos replay`.

    Example:  forge chaos poisson --mtbf 600 --nodes 4 > trace.jsonl
    """
    from forge.chaos.trace import poisson as make

    trace = make(num_nodes=nodes, mtbf_s=mtbf, down_s=down, duration_s=duration, seed=seed)
    sys.stdout.write(trace.to_jsonl())


@app.command()
def kill(
    run: RunArgument = "latest",
    rank: _RankOption = None,
    node: _NodeOption = None,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="The process that decides.")] = False,
    runs: RunsOption = _RUNS,
) -> None:
    """Kill a rank, a machine or the supervisor of a run, without a word.

    Example:  forge chaos kill latest --node 1
    """
    members = _members(run, runs)
    from forge.chaos import faults

    _require_one(rank=rank, node=node, supervisor=supervisor or None)
    if rank is not None:
        faults.kill(members.rank(rank))
        _done(run, f"rank {rank} was killed")
    elif node is not None:
        name = members.node(node)
        faults.kill_node_of(members.agents[name])
        _done(run, f"node {name} was killed")
    else:
        faults.kill(members.supervisor)
        _done(run, "the supervisor was killed")


@app.command()
def hang(
    run: RunArgument = "latest", rank: _RankOption = None, node: _NodeOption = None, runs: RunsOption = _RUNS
) -> None:
    """Stop a rank, or a machine's agent, so that it is there and does nothing.

    Example:  forge chaos hang latest --rank 0
    """
    members = _members(run, runs)
    from forge.chaos import faults

    _require_one(rank=rank, node=node)
    if rank is not None:
        faults.suspend(members.rank(rank))
        _done(run, f"rank {rank} stands still")
    else:
        name = members.node(node or "")
        faults.suspend(members.agents[name])
        _done(run, f"the agent of node {name} stands still")


@app.command()
def notice(
    node: Annotated[str, typer.Option("--node", help="Its number in the order of joining, or its id.")],
    run: RunArgument = "latest",
    seconds: Annotated[float, typer.Option(min=0.0, help="How long it is still there.")] = 30.0,
    runs: RunsOption = _RUNS,
) -> None:
    """Announce that a machine will be taken away; nobody takes it away.

    Example:  forge chaos notice latest --node 1 --seconds 30
    """
    name = _members(run, runs).node(node)
    from forge.chaos import faults

    faults.give_notice(name, seconds_left=seconds)
    _done(run, f"node {name} was given notice of {seconds:g} s")


def _members(run: str, runs: Path) -> Any:
    from forge.cluster.local.ray_cluster import require_private_token

    require_private_token()  # before Ray is imported
    from forge.chaos.faults import processes_of
    from forge.runs.reader import find_run

    return processes_of(find_run(run, root=runs))


def _require_one(**choices: Any) -> None:
    if sum(choice is not None for choice in choices.values()) != 1:
        names = " or ".join(f"--{name}" for name in choices)
        raise typer.BadParameter(f"give one of {names}")


def _done(run: str, what: str) -> None:
    from forge.cli import display

    display.message(what)
    display.next_command(f"forge runs watch {run}", purpose="see how it goes on")


def _path_of(trace: Path) -> Path:
    return Path("/dev/stdin") if str(trace) == "-" else trace
