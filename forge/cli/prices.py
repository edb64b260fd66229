"""`forge prices`: where GPUs are cheapest, per hour and per unit of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli.options import Output, OutputOption

if TYPE_CHECKING:
    from forge.pricing.choose import OfferFilter
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
    from forge.errors import ArgumentError
    from forge.pricing.choose import OfferFilter, find_offers
    from forge.pricing.offers import load_offers
    from forge.units import parse_fraction

    try:
        share = None if max_interruption is None else parse_fraction(max_interruption)
    except ValueError as error:
        raise ArgumentError(f"--max-interruption {error}") from None
    wanted = OfferFilter(gpu=gpu, spot=spot, max_interruption=share, region=region)
    table = load_offers(refresh=refresh)
    found = find_offers(table.offers, wanted=wanted)
    if gpu is None:
        found = [one for number, one in enumerate(found) if one.gpu not in {other.gpu for other in found[:number]}]
    if output is Output.JSON:
        display.print_json({"offers": [_record(offer) for offer in found], "notes": table.notes})
        return
    _print_table(found[:limit], wanted=wanted)
    if len(found) > limit:
        display.message(f"{len(found) - limit} more places: --limit {len(found)}")
    for note in table.notes:
        display.message(note)
    if not refresh:
        display.next_command("forge prices --refresh", purpose="prices of today")


def _print_table(offers: Sequence[Offer], *, wanted: OfferFilter) -> None:
    from forge.cli import display
    from forge.pricing.choose import usd_per_exaflop

    columns = ["GPU", "cloud", "region", "machine", "#GPUs", "#USD/GPU-h", "#USD/h", "#USD/EFLOP"]
    columns += ["interrupted"] if wanted.spot else ["#spot USD/GPU-h"]
    rows = []
    for offer in offers:
        if wanted.spot:
            last = "" if offer.interruption is None else str(offer.interruption)
        else:
            last = _number(offer.price(spot=True, per_gpu=True), digits=2)
        rows.append(
            [
                offer.gpu,
                offer.cloud,
                offer.place,
                offer.instance,
                str(offer.num_gpus),
                _number(offer.price(spot=wanted.spot, per_gpu=True), digits=2),
                _number(offer.price(spot=wanted.spot), digits=2),
                _number(usd_per_exaflop(offer, spot=wanted.spot), digits=4),
                last,
                _number(_co2_per_gpu(offer), digits=0),
                str(offer.observed),
            ]
        )
    display.table([*columns, "#g CO2/GPU-h", "as of"], rows)


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
