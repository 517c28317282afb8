"""`lipsync top`: what a compositor has loaded and serves, as it goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from lipsync.service_stats import ServiceStats

from .console import age, columns, out, size

_HEADINGS = ("model", "triton", "state", "device", "uses", "uses/s", "last use", "leases", "memory")

Uses = dict[tuple[str, str], int]
"""Of each Triton's models, so far."""


def top(
    server: Annotated[str, typer.Option(help="The compositor's HTTP address.")] = "127.0.0.1:8086",
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and print, for scripts.")] = False,
) -> None:
    """Watch a compositor: its Tritons and their budgets, loads, evictions, sessions, and its models by use."""
    service = ServiceStats(server)
    stats = service.read()
    if once:
        for line in lines(stats, time.time()):
            typer.echo(line)
        return
    with Live(_screen(stats, {}, 0), console=out, screen=True, auto_refresh=False) as live:
        before, looked_s = _uses(stats), time.monotonic()
        while True:
            time.sleep(every)
            stats, now_s = service.read(), time.monotonic()
            live.update(_screen(stats, before, now_s - looked_s), refresh=True)
            before, looked_s = _uses(stats), now_s


def lines(stats: dict[str, Any], now_s: float, before: Uses | None = None, passed_s: float = 0) -> Iterator[str]:
    """The view as text. before: the uses `passed_s` seconds earlier, from which rates are."""
    for endpoint in stats["endpoints"]:
        yield f"Triton {endpoint['endpoint']}: {_health(endpoint)}, {endpoint['leases']:g} under way"
        for device in endpoint["devices"]:
            yield f"  {device['device']}: {_budget(device)}"
        if counts := endpoint["counts"]:
            yield "  " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    sessions = Counter(session["tenant"] for session in stats["sessions"])
    named = "".join(f", {name} {count}" for name, count in sessions.most_common(10))
    yield f"{sessions.total()} sessions{named}{_overload(stats)}"
    yield ""
    yield from columns([_HEADINGS, *_rows(stats["models"], now_s, before or {}, passed_s)])


def _health(endpoint: dict[str, Any]) -> str:
    if not endpoint["up"]:
        return "DOWN"
    return "up" if endpoint["circuit"] == "closed" else "up, but INFERENCE FAILS"


def _overload(stats: dict[str, Any]) -> str:
    """Whether pictures are late, and how many sessions were refused since the service began; nothing where all is
    well."""
    late = f"; {stats['late_share']:.0%} of the pictures late" if stats["late_share"] else ""
    refused = ", ".join(f"{count} ({reason})" for reason, count in stats["refused"].items() if count)
    return late + (f"; refused: {refused}" if refused else "")


def _budget(device: dict[str, int]) -> str:
    most = f" of {size(device['most_bytes'])}" if device["most_bytes"] else ""
    return f"{device['models']} of {device['most_models']} tenants' models, {size(device['bytes'])}{most} in all"


def _rows(models: list[dict[str, Any]], now_s: float, before: Uses, passed_s: float) -> list[tuple[str, ...]]:
    """The models, those that are used the most now first, then by all uses."""
    rates = [_rate(model, before, passed_s) for model in models]
    ranked = sorted(zip(models, rates, strict=True), key=lambda each: (-(each[1] or 0), -each[0]["uses"]))
    return [
        (
            model["name"] + ("*" if model["pinned"] else ""),
            model["endpoint"],
            "others'" if model["state"] == "absent" else model["state"],
            model["device"] or "-",
            str(model["uses"]),
            "-" if rate is None else f"{rate:.1f}",
            age(now_s - model["last_use_s"]) if model["last_use_s"] else "-",
            str(model["leases"]),
            size(model["bytes"]) if model["bytes"] else "-",
        )
        for model, rate in ranked
    ]


def _rate(model: dict[str, Any], before: Uses, passed_s: float) -> float | None:
    """Uses a second since the last look; Triton counts anew after a load."""
    earlier = before.get((model["endpoint"], model["name"]))
    return None if earlier is None or passed_s <= 0 else max(model["uses"] - earlier, 0) / passed_s


def _uses(stats: dict[str, Any]) -> Uses:
    return {(model["endpoint"], model["name"]): model["uses"] for model in stats["models"]}


def _screen(stats: dict[str, Any], before: Uses, passed_s: float) -> Text:
    text = "\n".join(lines(stats, time.time(), before, passed_s))
    return Text(text, no_wrap=True, overflow="crop")
