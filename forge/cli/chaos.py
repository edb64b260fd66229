"""`forge chaos`: inject the failures of spot machines into a run, and measure what they cost."""

from __future__ import annotations

import math
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli.options import NodeOption, Output, OutputOption, RunArgument, RunsOption, SetOption

if TYPE_CHECKING:
    from forge.chaos.processes import RunProcesses

app = typer.Typer(
    help="Inject failures into a run, and measure what they cost.", no_args_is_help=True, rich_markup_mode=None
)

_RUNS = Path("runs")
_RankOption = Annotated[int | None, typer.Option("--rank", min=0, help="The process of this rank.")]


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A recorded spot trace; - for stdin.")],
    job: Annotated[Path, typer.Option("--job", metavar="FILE", help="The job file.")],
    nodes: Annotated[
        int, typer.Option(min=1, max=16, help="Largest number of simulated machines; the trace is scaled to it.")
    ] = 4,
    speed: Annotated[float, typer.Option(min=0.01, help="Play the trace this many times faster.")] = 1.0,
    notice: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds between a machine's preemption notice and its removal.")
    ] = None,
    overrides: SetOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Train a job on simulated machines that join and leave as in a spot trace.

    A trace has a line for each change, in the order of time; times count from the first line. Either CSV, as Bamboo
    writes it, with one machine a line: milliseconds,add|remove,node. Or JSON Lines, as Parcae and forge chaos
    poisson write them: [milliseconds, "add"|"remove"|"no-op", {"nodes": ["a", "b"]}]; "duration" in the object says
    how many milliseconds follow at least. Blank lines and lines that begin with # are skipped; any other line is
    an error. docs/chaos.md describes both formats.

    Example:  forge chaos replay trace.csv --job jobs/pretrain.yaml --nodes 4 --speed 10 -o json
    """
    from forge.cli import display
    from forge.cluster.local.ray_cluster import require_private_token

    require_private_token()  # before Ray is imported
    from forge.chaos.replay import replay as play
    from forge.chaos.trace import faster
    from forge.chaos.trace_file import read_trace
    from forge.chaos.trace_scale import scale
    from forge.cli.progress import PrepareScreen
    from forge.cli.run_screen import TrainScreen, show_goodput
    from forge.config.load import load_job
    from forge.report.text import replay_facts
    from forge.runs.goodput import goodput_of
    from forge.runs.reader import read_metrics, read_run
    from forge.runtime.resolve import resolve

    schedule = faster(scale(read_trace(_path_of(trace)), num_nodes=nodes), speed=speed)
    loaded = load_job(job, overrides=[*(overrides or []), f"resources.workers=1..{nodes}"])
    with PrepareScreen() as preparing:
        plan = resolve(loaded, on_progress=preparing.show)
    display.message(
        f"{len(schedule.changes)} changes in {schedule.duration_s:.0f} s, up to {schedule.max_nodes} nodes at once"
    )
    # A state folder of its own, so that only this run's driver finds the simulated cluster.
    with tempfile.TemporaryDirectory(prefix="forge-chaos-") as state:
        os.environ["FORGE_STATE"] = state
        with TrainScreen(plan, losses=[]) as screen:
            result = play(
                schedule, plan, notice_s=notice, speed=speed, on_record=screen.show, on_warning=screen.warn
            )
    if output is Output.JSON:
        display.print_json(result)
        return
    found = read_run(Path(result["folder"]))
    goodput = goodput_of(found.events, read_metrics(found.folder), now=None)
    show_goodput(goodput)
    for problem in result["problems"]:
        display.warning(problem)
    display.OUT.print()
    display.facts(replay_facts(goodput, num_added=result["num_added"], num_removed=result["num_removed"]))
    display.message(f"{result['steps']} steps, {result['samples_per_s']:.1f} samples per second overall")
    display.next_command(f"forge runs show {shlex.quote(result['folder'])}", purpose="show the run")


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A spot trace; - for stdin.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="elastic, restart or rigid; repeat it for several. All by default.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Scale the trace to at most this many machines.")] = None,
    step: Annotated[float, typer.Option(help="Seconds of a step on all machines.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="The run ends after these steps.")] = None,
    min_nodes: Annotated[int, typer.Option(min=1, help="With fewer machines the run waits.")] = 1,
    fixed_nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Machines that `rigid` trains on; half of the trace's most by default."),
    ] = None,
    pause: Annotated[
        float | None, typer.Option(help="Seconds that a change costs `elastic`, measured ones by default.")
    ] = None,
    notice: Annotated[
        float, typer.Option(min=0.0, help="Seconds between a machine's notice and its removal; 0: no notice.")
    ] = 30.0,
    restart: Annotated[float, typer.Option(help="Seconds to start all processes and read a checkpoint.")] = 120.0,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 600.0,
    node_start: Annotated[float, typer.Option(help="Seconds until a new machine's workers can train.")] = 14.0,
    usd_per_node_hour: Annotated[float | None, typer.Option(min=0.0, help="Price of a machine.")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compute what a run on a spot trace would train, lose and cost, without training.

    A trace is read as by `forge chaos replay`. The policies: elastic, as forge trains; restart, where every change
    restarts all processes from the last checkpoint; rigid, the same on a fixed number of machines.

    Example:  forge chaos simulate trace.csv --step 12 --usd-per-node-hour 1.20
    """
    from forge.chaos.simulate import require_trainable
    from forge.chaos.simulate import simulate as run
    from forge.chaos.simulation import POLICIES, SimulationSettings, read_policy
    from forge.chaos.trace_file import read_trace
    from forge.chaos.trace_scale import scale
    from forge.cli import display
    from forge.cli.simulation_table import SIMULATION_COLUMNS, simulation_row, simulation_settings_text
    from forge.errors import ArgumentError

    policies = list(dict.fromkeys(map(read_policy, policy))) if policy else list(POLICIES)
    if fixed_nodes is not None and "rigid" not in policies:
        raise ArgumentError("--fixed-nodes applies to the policy rigid only; add --policy rigid or leave it out")
    settings = SimulationSettings(
        step_s=step,
        total_steps=math.inf if steps is None else steps,
        min_nodes=min_nodes,
        num_nodes=fixed_nodes,
        node_start_s=node_start,
        notice_s=notice or None,
        restart_s=restart,
        checkpoint_every_s=checkpoint_every,
        usd_per_node_hour=usd_per_node_hour,
    )
    if pause is not None:
        settings = replace(settings, loss_pause_s=pause, planned_pause_s=pause)
    history = read_trace(_path_of(trace))
    history = history if nodes is None else scale(history, num_nodes=nodes)
    require_trainable(history, settings)
    results = [run(history, each, settings=settings) for each in policies]
    if output is Output.JSON:
        display.print_json({"settings": asdict(settings), "runs": [asdict(result) for result in results]})
        return
    display.message(simulation_settings_text(settings, trace=history))
    display.table(SIMULATION_COLUMNS, [simulation_row(result, total_steps=steps) for result in results])


@app.command()
def poisson(
    mtbf: Annotated[float, typer.Option(min=0.001, help="Mean seconds until a machine is lost.")],
    down: Annotated[float, typer.Option(min=0.0, help="Seconds until a lost machine is replaced.")] = 60.0,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")] = 4,
    duration: Annotated[float, typer.Option(min=0.001, help="Length of the trace in seconds.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
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
    node: NodeOption = None,
    supervisor: Annotated[bool, typer.Option("--supervisor", help="The supervisor process.")] = False,
    runs: RunsOption = _RUNS,
) -> None:
    """Kill a rank, a node or the supervisor of a run with SIGKILL.

    Example:  forge chaos kill latest --node 1
    """
    from forge.chaos import processes

    _require_one(rank=rank, node=node, supervisor=supervisor or None)
    members = _members(run, runs)
    if rank is not None:
        processes.kill(members.rank(rank), members=members)
        _done(run, f"rank {rank} was killed")
    elif node is not None:
        name = members.node(node)
        from forge.cluster.local.ray_cluster import require_private_token

        require_private_token()  # before Ray is imported
        from forge.chaos import faults

        faults.kill_node_of(members.agents[name])
        _done(run, f"node {name} was killed")
    else:
        processes.kill(members.supervisor, members=members)
        _done(run, "the supervisor was killed")


@app.command()
def hang(
    run: RunArgument = "latest", rank: _RankOption = None, node: NodeOption = None, runs: RunsOption = _RUNS
) -> None:
    """Suspend a rank, or a node's agent, so that it stays connected but makes no progress.

    Example:  forge chaos hang latest --rank 0
    """
    from forge.chaos import processes

    _require_one(rank=rank, node=node)
    members = _members(run, runs)
    if rank is not None:
        processes.suspend(members.rank(rank), members=members)
        _done(run, f"rank {rank} is suspended")
    else:
        name = members.node(node or "")
        processes.suspend(members.agents[name], members=members)
        _done(run, f"the agent of node {name} is suspended")


@app.command()
def slow(
    rank: Annotated[int, typer.Option("--rank", min=0, help="The process of this rank.")],
    run: RunArgument = "latest",
    factor: Annotated[
        float, typer.Option(min=1.01, max=100.0, help="What it computes takes so many times as long.")
    ] = 3.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")] = 60.0,
    runs: RunsOption = _RUNS,
) -> None:
    """Slow a rank down: stop and continue its process in turns, until the time is over or Ctrl-C.

    Example:  forge chaos slow latest --rank 1 --factor 3 --seconds 120
    """
    from forge.chaos import processes

    members = _members(run, runs)
    still_runs = processes.slow_down(members.rank(rank), members=members, factor=factor, seconds=seconds)
    _done(run, f"rank {rank} was slowed down" if still_runs else f"rank {rank} was slowed down until it ended")


@app.command()
def notice(
    node: Annotated[
        str, typer.Option("--node", metavar="NODE", help="A node: its number in the order of joining, or its id.")
    ],
    run: RunArgument = "latest",
    seconds: Annotated[float, typer.Option(min=0.0, help="Announced seconds until the removal.")] = 30.0,
    runs: RunsOption = _RUNS,
) -> None:
    """Send a preemption notice for a node; the node is not removed.

    Example:  forge chaos notice latest --node 1 --seconds 30
    """
    name = _members(run, runs).node(node)
    from forge.cluster.local.ray_cluster import require_private_token

    require_private_token()  # before Ray is imported
    from forge.chaos import faults

    faults.give_notice(name, seconds_left=seconds)
    _done(run, f"node {name} got a preemption notice of {seconds:g} s")


def _members(run: str, runs: Path) -> RunProcesses:
    from forge.chaos.processes import processes_of
    from forge.runs.reader import find_run

    return processes_of(find_run(run, root=runs))


def _require_one(**choices: Any) -> None:
    if sum(choice is not None for choice in choices.values()) != 1:
        names = " or ".join(f"--{name}" for name in choices)
        raise typer.BadParameter(f"give one of {names}")


def _done(run: str, what: str) -> None:
    from forge.cli import display

    display.message(what)
    display.next_command(f"forge runs watch {shlex.quote(run)}", purpose="watch the run")


def _path_of(trace: Path) -> Path:
    return Path("/dev/stdin") if str(trace) == "-" else trace
