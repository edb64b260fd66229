"""Servers as `forge serve status` shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.runtime.servers import ServerStatus


def server_record(server: ServerStatus) -> dict[str, Any]:
    return {**server.record, "name": server.name, "state": server.state, "folder": str(server.folder)}


def server_row(server: ServerStatus) -> tuple[str, ...]:
    found = server.record
    speed = found.get("tokens_per_s") if server.is_alive else None
    load = ("replicas", "running", "waiting")
    return (
        server.name,
        server.state,
        str(found.get("url", "")),
        str(found.get("model", "")),
        *(str(found.get(name, "")) if server.is_alive else "" for name in load),
        "" if speed is None else f"{speed:.1f}",
    )


def server_facts(server: ServerStatus) -> list[tuple[str, str]]:
    """The state of one server, line by line."""
    from forge.units import format_count, format_duration

    found = server.record
    rows = [("server", server.name), ("state", server.state), ("says", server.message)]
    rows += [
        (name, str(found[key]))
        for name, key in (
            ("address", "url"),
            ("model", "model"),
            ("serves", "source"),
            ("engine", "engine"),
            ("cluster", "cluster"),
        )
        if key in found
    ]
    if "replicas" not in found or not server.is_alive:  # the load is that of its last second
        return [row for row in rows if row[1]]
    busy, usd = found["busy_tokens_per_s"], found["usd_per_million_tokens"]
    speed = f"{found['tokens_per_s']:.1f} tokens/s over the last minute"
    if busy is not None:
        speed += f", {busy:.1f} while requests ran"
    price = f"{usd:.2f} USD per million generated tokens" if usd is not None else "unknown"
    if found["usd_per_hour"] is None:
        price = "unknown: set FORGE_USD_PER_HOUR to the machine's price"
    rows += [
        ("up for", format_duration(found["uptime_s"])),
        ("replicas", str(found["replicas"])),
        ("requests", f"{found['running']} running, {found['waiting']} waiting"),
        (
            "tokens",
            f"{format_count(found['prompt_tokens'])} read, {format_count(found['completion_tokens'])} generated",
        ),
        ("speed", speed),
        ("cost", price),
    ]
    return [row for row in rows if row[1]]
