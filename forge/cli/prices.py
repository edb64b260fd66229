"""`forge prices`: where GPUs are cheapest, per hour and per unit of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli.options import Output, OutputOption

if TYPE_CHECKING:
    from forge.pricing.offers import Offer

_ROWS = 20


def prices(
    gpu: Annotated[
        str | None,
        typer.Argument(
            metavar="[GPU]", help="Such as H100 or A100-80GB; without it, the cheapest place of each GPU."
        ),
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Spot prices instead of on-demand prices.")] = False,
    max_interruption: Annotated[
        str | None,
        typer.Option(
            "--max-interruption", metavar="SHARE", help="Leave out spot offers interrupted more often a month: 10%."
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            "--region", metavar="NAME", help="A part of the world (eu, us, asia), or the start of a region."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows of the table; json has all.")] = _ROWS,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the clouds for their prices of today.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show where GPUs are cheapest, with the day of the prices.

    Example:  forge prices H100 --spot --max-interruption 10% --region eu
    """
    from forge.cli import display
    from forge.pricing.choose import OfferFilter, find_offers, unknown_interruptions
    from forge.pricing.offers import load_offers

    share = None if max_interruption is None else _share(max_interruption)
    wanted = OfferFilter(gpu=gpu, spot=spot, max_interruption=share, region=region)
    table = load_offers(refresh=refresh)
    found = find_offers(table.offers, wanted=wanted)
    notes = [*unknown_interruptions(table.offers, wanted=wanted), *table.notes]
    if gpu is None:
        found = [one for number, one in enumerate(found) if one.gpu not in {other.gpu for other in found[:number]}]
    if output is Output.JSON:
        display.print_json({"offers": [_record(offer) for offer in found], "notes": notes})
        return
    _print_table(found[:limit], spot=spot)
    if len(found) > limit:
        display.message(f"{len(found) - limit} more places: --limit {len(found)}")
    for note in notes:
        display.message(note)
    if not refresh:
        display.next_command("forge prices --refresh", purpose="prices of today")


def _share(text: str) -> float:
    """Parse a share of at most 100 %. Raises: ArgumentError for anything else."""
    from forge.errors import ArgumentError, printable
    from forge.units import parse_fraction

    shown = printable(text, limit=40)
    try:
        share = parse_fraction(text)
    except ValueError as error:
        raise ArgumentError(f"--max-interruption '{shown}' {error}") from None
    if share > 1:
        raise ArgumentError(f"--max-interruption {shown} is {share:,.0%}, more than all; write it like 10% or 0.1")
    return share


def _print_table(offers: Sequence[Offer], *, spot: bool) -> None:
    """Print the offers; a column that would say nothing is left out."""
    from forge.cli import display
    from forge.pricing.choose import usd_per_exaflop

    columns = {
        "GPU": [offer.gpu for offer in offers],
        "cloud": [offer.cloud for offer in offers],
        "region": [offer.place if spot else offer.region for offer in offers],
        "machine": [offer.instance for offer in offers],
        "#GPUs": [str(offer.num_gpus) for offer in offers],
        "#USD per GPU-h": [_number(offer.price(spot=spot, per_gpu=True), digits=2) for offer in offers],
        "#USD per h": [_number(offer.price(spot=spot), digits=2) for offer in offers],
        "#USD per EFLOP": [_number(usd_per_exaflop(offer, spot=spot), digits=3) for offer in offers],
        "#spot USD per GPU-h": [
            "" if spot else _number(offer.price(spot=True, per_gpu=True), digits=2) for offer in offers
        ],
        "interrupted": [str(offer.interruption or "") if spot else "" for offer in offers],
        "#g CO2 per GPU-h": [_number(_co2_per_gpu(offer), digits=0) for offer in offers],
        "as of": [str(offer.observed) for offer in offers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    if len(set(columns["GPU"])) == 1:
        display.headline(columns["GPU"][0], "spot" if spot else "on demand", console=display.OUT)
        del shown["GPU"]
    display.table([*shown], [list(row) for row in zip(*shown.values(), strict=True)])


def _record(offer: Offer) -> dict[str, Any]:
    from dataclasses import asdict

    from forge.pricing.choose import usd_per_exaflop

    return asdict(offer) | {
        "observed": str(offer.observed),
        "usd_per_gpu_hour": offer.price(spot=False, per_gpu=True),
        "spot_usd_per_gpu_hour": offer.price(spot=True, per_gpu=True),
        "usd_per_exaflop": usd_per_exaflop(offer, spot=False),
        "spot_usd_per_exaflop": usd_per_exaflop(offer, spot=True),
        "co2_g_per_gpu_hour": _co2_per_gpu(offer),
    }


def _co2_per_gpu(offer: Offer) -> float | None:
    return None if offer.co2_g_per_hour is None else offer.co2_g_per_hour / offer.num_gpus


def _number(value: float | None, *, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
