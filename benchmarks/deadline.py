"""Compare the deadline policies of `forge.plan.deadline` in simulation, on random and recorded spot availability.

    python -m benchmarks.deadline [--traces FOLDER] --json FILE

Random availability: runs of 24 h on 8 machines, deadlines of 1.15 to 2 times that, spot machines there 30 to 90 %
of the time with outages of 30 min or 2 h, starts of 3 or 10 min; either all machines of a region are lost at
once, or each by itself; in one region or three. Prices: on-demand 10, spot 3.50 USD (3.80 and 4.10 in the second
and third region). `FOLDER` has `bamboo-p3.csv`: runs of 5 to 8 h on 8 to 24 of its machines.

`ratio_vs_uniform_progress` is the mean, over the settings, of elastic ÷ uniform progress in the same regions;
`ratio_vs_home` the same with uniform progress in the first region alone, as it was published. `least` is the
bound that no policy can undercut; `optimum` the cost of the best choices of a policy that knows all rates but not
the future (`benchmarks.deadline_optimum`), where all machines of a region are lost at once.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.deadline_optimum import OnOffSpot, find_optimum
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.chaos.deadline_simulation import (
    DeadlineJob,
    RegionAvailability,
    availability_of,
    least_usd,
    random_availability,
    simulate_deadline,
)
from forge.chaos.trace_file import read_trace
from forge.plan.deadline import DEADLINE_POLICIES

_HOUR_S = 3600.0
_NUM_NODES = 8
_INTERVALS = 3000
_SETTINGS = tuple(itertools.product((0.3, 0.5, 0.7, 0.9), (1.15, 1.3, 1.5, 2.0), (180.0, 600.0), (1800.0, 7200.0)))
"""Share of the time with spot machines, deadline ÷ work, seconds of a start, mean seconds of an outage."""


def main() -> None:
    """Simulate every policy in every setting."""
    parser = benchmark_parser(__doc__, repeats=6)
    parser.add_argument("--traces", type=Path, metavar="FOLDER")
    options = parse_options(parser, smallest={})
    settings = _SETTINGS[::16] if options.smallest else _SETTINGS
    figures: dict[str, object] = {}
    for num_regions, is_each in itertools.product((1, 3), (False, True)):
        best = [] if is_each else _optimum(settings, num_regions=num_regions, num_seeds=options.repeats)
        kind = f"{num_regions} region{'s' * (num_regions > 1)}, {'one by one' if is_each else 'all at once'}"
        figures[kind] = _compare(
            [
                (_job(setting), _regions(setting, num_regions=num_regions, is_each=is_each, seed=seed))
                for setting in settings
                for seed in range(options.repeats)
            ],
            title=f"random availability, {kind}",
            best=best,
        )
    if options.traces is not None:
        counts = availability_of(read_trace(options.traces / "bamboo-p3.csv"), interval_s=60)
        region = RegionAvailability(counts=counts, usd_per_hour=0.918)
        for num_nodes in (8, 16, 24):
            cases = [
                DeadlineJob(
                    work_s=work * _HOUR_S,
                    deadline_s=deadline * _HOUR_S,
                    num_nodes=num_nodes,
                    on_demand_usd_per_hour=3.06,
                )
                for work, deadline in ((6, 8), (8, 11), (5, 11))
            ]
            name = f"bamboo-p3, {num_nodes} machines"
            figures[name] = _compare([(case, [region]) for case in cases], title=name)
    write_json(options.json, figures=figures)


def _job(setting: tuple[float, float, float, float]) -> DeadlineJob:
    _, slack, start_s, _ = setting
    work_s = 24 * _HOUR_S
    return DeadlineJob(
        work_s=work_s,
        deadline_s=slack * work_s,
        num_nodes=_NUM_NODES,
        start_s=start_s,
        on_demand_usd_per_hour=10.0,
    )


def _regions(
    setting: tuple[float, float, float, float], *, num_regions: int, is_each: bool, seed: int
) -> list[RegionAvailability]:
    share, _, _, outage_s = setting

    def counts(num_nodes: int, number: int) -> list[int]:
        return random_availability(
            num_nodes=num_nodes,
            share=share,
            mean_outage_s=outage_s,
            num_intervals=_INTERVALS,
            interval_s=60,
            seed=number,
        )

    regions = []
    for k in range(num_regions):
        if is_each:
            nodes = [counts(1, 1000 * seed + 10 * k + node) for node in range(_NUM_NODES)]
            available = [sum(each) for each in zip(*nodes, strict=True)]
        else:
            available = counts(_NUM_NODES, 100 * seed + k)
        regions.append(RegionAvailability(counts=available, usd_per_hour=3.5 + 0.3 * k))
    return regions


def _optimum(
    settings: Sequence[tuple[float, float, float, float]], *, num_regions: int, num_seeds: int
) -> list[float]:
    """Costs of the best choices with known rates, in the order of the cases."""
    found = []
    for setting in settings:
        share, _, start_s, outage_s = setting
        job = _job(setting)
        regions = [
            _regions(setting, num_regions=num_regions, is_each=False, seed=seed) for seed in range(num_seeds)
        ]
        spot = OnOffSpot(
            usd_per_hour=tuple(_NUM_NODES * region.usd_per_hour for region in regions[0]),
            on_demand_usd_per_hour=_NUM_NODES * job.on_demand_usd_per_hour,
            mean_there_s=outage_s * share / (1 - share),
            mean_outage_s=outage_s,
            start_s=start_s,
        )
        optimum = find_optimum(spot, work_s=job.work_s, deadline_s=job.deadline_s)
        step = round(start_s / job.interval_s)
        found += [optimum.usd([region.counts[::step] for region in each]) for each in regions]
    return found


def _compare(
    cases: list[tuple[DeadlineJob, list[RegionAvailability]]], *, title: str, best: Sequence[float] = ()
) -> dict[str, object]:
    """Print the mean cost of each policy relative to on-demand, and how many deadlines it missed.

    Args:
        best: costs of the best choices with known rates, if they can be computed.
    """
    results = [
        {policy: simulate_deadline(policy, job, regions=regions) for policy in DEADLINE_POLICIES}
        for job, regions in cases
    ]
    home = [simulate_deadline("uniform-progress", job, regions=regions[:1]).usd for job, regions in cases]
    least = [least_usd(job, regions=regions) for job, regions in cases]
    by_policy = {
        policy: (
            statistics.fmean(each[policy].usd / each["on-demand"].usd for each in results),
            sum(not each[policy].is_met for each in results),
        )
        for policy in DEADLINE_POLICIES
    }
    figures: dict[str, object] = {
        policy: {"usd_vs_on_demand": ratio, "missed": missed} for policy, (ratio, missed) in by_policy.items()
    }
    elastic = [each["elastic"].usd for each in results]
    uniform = [each["uniform-progress"].usd for each in results]
    pairs = zip(elastic, uniform, home, least, results, strict=True)
    ratios = [(e / u, e / h, bound / each["on-demand"].usd) for e, u, h, bound, each in pairs]
    names = ("ratio_vs_uniform_progress", "ratio_vs_home", "least_vs_on_demand")
    figures |= {name: statistics.fmean(each) for name, each in zip(names, zip(*ratios, strict=True), strict=True)}
    if best:
        ratios_of_best = [cost / u for cost, u in zip(best, uniform, strict=True)]
        figures["optimum_vs_uniform_progress"] = statistics.fmean(ratios_of_best)
    print_table(
        f"{title} ({len(cases)} runs)",
        header=("policy", "USD ÷ on-demand", "deadlines missed"),
        rows=[
            *((policy, f"{ratio:.3f}", f"{missed}") for policy, (ratio, missed) in by_policy.items()),
            ("least", f"{figures['least_vs_on_demand']:.3f}", ""),
            *([("optimum ÷ uniform progress", f"{statistics.fmean(ratios_of_best):.3f}", "")] if best else []),
            ("elastic ÷ uniform progress", f"{figures['ratio_vs_uniform_progress']:.3f}", ""),
            ("elastic ÷ uniform progress at home", f"{figures['ratio_vs_home']:.3f}", ""),
        ],
    )
    return figures


if __name__ == "__main__":
    main()
