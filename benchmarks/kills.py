"""Kill processes that write checkpoints, at random moments, and count damaged and lost checkpoints.

    python -m benchmarks.kills --kills 1000 --deepspeed-kills 100 --json FILE

`broken`: what a resume would read is incomplete or differs from what was saved. For forge this is any folder named
like a checkpoint; for DeepSpeed it is what `latest` names, or `latest` itself (it does not fall back to an older
one). `lost`: the newest complete checkpoint is older than a save that was reported as done. The two write different
states, so their times must not be compared; see `tests.support.kills`.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from benchmarks.peers.deepspeed_kills import kill_deepspeed
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from tests.support.kills import PHASES, KillReport, kill_forge


def main() -> None:
    """Kill writers of both, and print the results."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="of forge's writers")
    parser.add_argument("--deepspeed-kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    options = parse_options(parser, smallest={"kills": 3, "deepspeed_kills": 1})
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as name:
        folder = Path(name)
        reports = {
            "forge": kill_forge(folder / "forge", num_kills=options.kills, seed=options.seed),
            "DeepSpeed": kill_deepspeed(folder / "deepspeed", num_kills=options.deepspeed_kills, seed=options.seed),
        }
    print_reports(reports, seed=options.seed)
    write_json(
        options.json, figures={"seed": options.seed, **{name: vars(report) for name, report in reports.items()}}
    )


def print_reports(reports: dict[str, KillReport], *, seed: int) -> None:
    """Print what was broken or lost, and in which phases processes were killed."""
    print_table(
        f"SIGKILL at random moments of saving (seed {seed})",
        header=("", "kills", "broken", "lost", "saved", "ms per save", "seconds"),
        rows=[
            (
                name,
                f"{report.num_kills:,}",
                f"{len(report.broken):,}",
                f"{len(report.lost):,}",
                f"{report.num_committed:,}",
                f"{report.save_ms:.1f}",
                f"{report.seconds:.0f}",
            )
            for name, report in reports.items()
        ],
    )
    forge, deepspeed = reports["forge"], reports["DeepSpeed"]
    print_table(
        "what forge's writer processes were doing when they were killed",
        header=("", "kills"),
        rows=[(phase, f"{forge.phases[phase]:,}") for phase in ("save", *PHASES, "idle")],
    )
    for name, report in reports.items():
        victims = [f"{victim} {number:,}" for victim, number in sorted(report.victims.items())]
        print(f"\n{name}'s victims: {', '.join(victims)}")
    print(f"DeepSpeed was inside save_checkpoint in {deepspeed.phases['save']:,} of {deepspeed.num_kills:,} kills")
    for line in [*forge.broken, *forge.lost, *forge.left, *forge.crashed]:
        print(f"forge: {line}")
    for line in [*deepspeed.broken, *deepspeed.lost]:
        print(f"DeepSpeed: {line}")


if __name__ == "__main__":
    main()
