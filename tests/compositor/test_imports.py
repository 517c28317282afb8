"""The direction in which the compositor's modules import each other, and who may know which library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "compositor"
LAYERS = [
    [
        "errors",
        "geometry",
        "deadline",
        "settings",
        "web_origin",
        "metrics",
        "clock",
        "batching",
        "threads",
        "memory",
        "limits",
        "signals",
        "scratch",
        "disk",
        "logs",
        "tracing",
        "telemetry",
        "proto",
        "residency.models",
        "sessions.prefetching",
    ],
    [
        "pcm",
        "audio",
        "features",
        "jpeg",
        "blending",
        "manifest",
        "tenant",
        "tenants",
        "catalogue",
        "rendering",
        "video",
        "sessions.events",
        "sessions.outbox",
        "sessions.speech",
        "triton.shared_memory",
        "triton.slots",
        "triton.channel",
        "triton.connection",
        "triton.control",
        "triton.inference",
    ],
    ["call", "residency", "triton", "pipeline"],
    ["sessions"],
    ["transports", "health", "auth"],
    ["draining", "server"],
    ["workers"],
    ["__main__"],
]
"""A module imports from its own layer and those above it in this list, never from those below. A package stands for
those of its modules that are not named. Modules that are not there yet have their place already."""
PURE = [
    "errors",
    "geometry",
    "web_origin",
    "residency.models",
    "residency.usage",
    "residency.budget",
    "residency.headroom",
    "residency.plan",
    "triton.breaker",
    "pcm",
    "audio",
    "features",
    "jpeg",
    "blending",
    "rendering",
    "manifest",
    "tenant",
    "sessions.pressure",
    "sessions.shedding",
    "transports.faults",
    "transports.origins",
    "transports.wire",
]
OWNERS = {
    "tritonclient": {"triton.channel", "triton.connection", "triton.control", "triton.inference"},
    "turbojpeg": {"jpeg"},
    "av": {"video"},
    "prometheus_client": {"metrics"},
    "opentelemetry": {"telemetry"},
    "uvicorn": {"transports.connections", "transports.web"},
    "websockets": {"transports.connections"},
    "starlette": {"transports.http", "transports.uploads", "transports.websocket"},
}
NEVER = {"onnx", "onnxruntime", "PIL", "typer", "rich", "lipsync", "pytest", "torch"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name inside it; generated code aside."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if "_pb2" not in path.name and path != PACKAGE / "__init__.py":
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imported(module: str) -> frozenset[str]:
    """Absolute dotted names of all that a module imports, wherever in it the import stands."""
    path = modules()[module]
    package = ["compositor", *module.split(".")[: None if path.name == "__init__.py" else -1]]
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return frozenset(names)


def own(module: str) -> set[str]:
    """The compositor's modules that a module imports."""
    known = modules()
    found = set()
    for name in imported(module):
        parts = name.split(".")
        if parts[0] == "compositor":
            inside = parts[1:]
            while inside and ".".join(inside) not in known:
                inside.pop()
            found.add(".".join(inside) or "proto" if "proto" in parts else ".".join(inside))
    return found - {module, ""}


def foreign(module: str) -> set[str]:
    """Top-level packages that a module imports."""
    return {name.split(".")[0] for name in imported(module)} - {"compositor"}


def reach(module: str) -> set[str]:
    """A module and all of the compositor's that it imports, directly or not."""
    seen, waiting = {module}, [module]
    while waiting:
        for name in own(waiting.pop()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def layer(module: str) -> int:
    for name in (module, module.split(".")[0]):
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    raise AssertionError(f"compositor/{module}.py has no layer: give it one in LAYERS")


def uses(module: str, attribute: str) -> Iterator[int]:
    """Lines in which a module says os.<attribute>, or imports it from os."""
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr == attribute and getattr(node.value, "id", "") == "os":
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os" and attribute in [a.name for a in node.names]:
            yield node.lineno


def test_the_imports_are_seen() -> None:
    """The other tests say nothing where this one fails."""
    assert {"tenant", "jpeg", "blending", "errors"} <= own("rendering")
    assert {"pipeline", "errors", "proto", "pcm"} <= own("transports.rpc")
    assert "tritonclient" in foreign("triton.inference") & foreign("triton.connection")
    assert "asyncio" in foreign("pipeline")
    assert {"jpeg", "geometry", "settings"} <= reach("__main__")


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module: str) -> None:
    wrong = {name for name in own(module) if layer(name) > layer(module)}
    assert not wrong, f"{module} may not import {wrong}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_make_no_circle(module: str) -> None:
    assert all(module not in reach(name) for name in own(module))


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_io(module: str) -> None:
    for name in reach(module):
        assert not foreign(name) & {"asyncio", "grpc", "tritonclient", "aiohttp", "starlette"}, name


@pytest.mark.parametrize("module", sorted(modules()))
def test_each_library_has_its_owner(module: str) -> None:
    for library, owners in OWNERS.items():
        assert module in owners or library not in foreign(module), f"only {owners} may import {library}"
    assert not foreign(module) & NEVER


@pytest.mark.parametrize("module", sorted(modules()))
def test_only_settings_reads_the_environment(module: str) -> None:
    # libturbojpeg 2.x takes the restart interval from TJ_RESTART only.
    if module not in ("settings", "jpeg"):
        assert not [*uses(module, "environ"), *uses(module, "getenv"), *uses(module, "putenv")]


@pytest.mark.parametrize("extra", ["video", "telemetry"])
def test_what_an_extra_brings_is_imported_where_it_is_needed_only(extra: str) -> None:
    """It may not be installed: what the service imports at its start does without."""
    for name in modules():
        source = ast.parse(modules()[name].read_text(encoding="utf-8"))
        at_start = {node.module for node in source.body if isinstance(node, ast.ImportFrom)}
        assert extra not in at_start, name


def test_jpeg_touches_one_variable() -> None:
    lines = modules()["jpeg"].read_text(encoding="utf-8").splitlines()
    used = {lines[number - 1].strip() for number in uses("jpeg", "environ")}
    assert used == {'os.environ["TJ_RESTART"] = f"{interval}B"', 'os.environ.setdefault("TJ_RESTART", "0B")'}
