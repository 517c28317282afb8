"""What is known of every tenant of a repository, quickly: its files and the Tritons' answers go in, entries come out.

For thousands of tenants: of a manifest only the fields that are listed are read, and Triton is asked once for all.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from compositor.catalogue import CONFIG, memory_of
from compositor.errors import DeadlinePassed, LipsyncError, TritonUnavailable
from compositor.manifest import FORMAT, MANIFEST, NAME, read_manifest
from compositor.residency.models import Use
from compositor.settings import TritonSettings
from compositor.triton.inference import Triton

PATIENCE_S = 3.0
"""How long a Triton may take to answer."""

FIELDS = re.compile(
    rf'{{\s*"format": {FORMAT},\s*"tenant": "([^"\\]*)",\s*"created": "([^"\\]*)",\s*"frames": ([0-9]{{1,9}}),\s*'
    r'"width": ([0-9]{1,9}),\s*"height": ([0-9]{1,9}),\s*"fps": ([0-9]{1,9}),[^{]*"encoder": "([^"\\]*)",'
)
"""The begin of a manifest as `tenant add` writes it. Reading all of 11,000 as JSON, and checking it, takes a second."""


@dataclass(frozen=True)
class Copy:
    """A tenant's model in a Triton's memory."""

    triton: str
    """host:port."""
    state: str
    """ready, loading or unloading."""
    device: str
    """By Triton's own word: cpu, gpu0, or gpu0+gpu1 where it has a copy on each; - while it comes or goes."""
    uses: int
    """Frames inferred since the load."""
    last_use_s: float
    """Seconds since 1970; 0.0: never."""


@dataclass
class Entry:
    """A tenant as it is listed; where `fault` says what is wrong with it, the rest is empty."""

    tenant: str
    frames: int = 0
    width: int = 0
    height: int = 0
    fps: int = 0
    encoder: str = ""
    created: str = ""
    memory_bytes: int = 0
    """What the loaded model takes, as measured when it was added; 0: not known."""
    fault: str = ""
    copies: list[Copy] = field(default_factory=list)


def list_tenants(repository: Path, settings: TritonSettings) -> tuple[list[Entry], dict[str, str]]:
    """The tenants by name; and by its address, why a Triton does not say what it has loaded. Raises SettingsInvalid."""
    return asyncio.run(_list_tenants(repository, settings))


async def _list_tenants(repository: Path, settings: TritonSettings) -> tuple[list[Entry], dict[str, str]]:
    asking = [asyncio.create_task(_copies(triton, settings)) for triton in settings.endpoints]
    entries = await asyncio.to_thread(read_entries, repository)
    answers = dict(zip(settings.endpoints, await asyncio.gather(*asking), strict=True))
    named = {entry.tenant: entry for entry in entries}
    for copies in answers.values():
        if not isinstance(copies, str):
            for model in copies.keys() & named.keys():
                named[model].copies.append(copies[model])
    return entries, {triton: reason for triton, reason in answers.items() if isinstance(reason, str)}


def read_entries(repository: Path) -> list[Entry]:
    """What the files say, by name."""
    try:
        with os.scandir(repository) as found:
            names = sorted(entry.name for entry in found if NAME.fullmatch(entry.name))
    except FileNotFoundError:
        return []
    return [entry for name in names if (entry := _read_entry(repository, name))]


def _read_entry(repository: Path, name: str) -> Entry | None:
    """An entry, unless the model is no tenant."""
    try:
        manifest = _content(f"{repository}/{name}/1/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        manifest = ""
    fields = FIELDS.match(manifest)
    if fields and fields[1] == name:
        _, created, frames, width, height, fps, encoder = fields.groups()
        return Entry(name, int(frames), int(width), int(height), int(fps), encoder, created, _memory(repository, name))
    try:
        whole = read_manifest(repository, name)
    except LipsyncError as error:
        return Entry(name, fault=error.message)
    memory = _memory(repository, name)
    return Entry(name, whole.frames, whole.width, whole.height, whole.fps, whole.encoder, whole.created, memory)


def _memory(repository: Path, name: str) -> int:
    try:
        return memory_of(_content(f"{repository}/{name}/{CONFIG}"))
    except OSError:
        return 0


def _content(path: str) -> str:
    """The begin of a file, all of those read here. By descriptor: objects of paths and files take as long again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


async def _copies(triton: str, settings: TritonSettings) -> dict[str, Copy] | str:
    """The models in a Triton's memory, or why it does not say."""
    server = Triton(settings, triton)
    try:
        return await asyncio.wait_for(_ask(server), PATIENCE_S)
    except (TritonUnavailable, DeadlinePassed, asyncio.TimeoutError):
        return "it does not answer"
    except LipsyncError as error:
        return error.message
    finally:
        await server.close()


async def _ask(server: Triton) -> dict[str, Copy]:
    states, uses = await asyncio.gather(server.states(), server.uses())
    devices = await asyncio.gather(*(_device(server, model) for model in states))
    never = Use(0, 0.0)
    return {
        model: Copy(
            server.endpoint,
            state.lower(),
            device,
            uses.get(model, never).count,
            uses.get(model, never).last_s,
        )
        for (model, state), device in zip(states.items(), devices, strict=True)
    }


async def _device(server: Triton, model: str) -> str:
    try:
        return "+".join(f"gpu{gpu}" for gpu in await server.gpus(model)) or "cpu"
    except LipsyncError:  # it comes or goes
        return "-"
