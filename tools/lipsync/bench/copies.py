"""Tenants by the thousand from one: a prepared tenant comes in, others that share its files by hard links come out, so
that all of them together take little more of the disk than their names, manifests and configurations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from compositor import manifest as files
from compositor.catalogue import CONFIG
from compositor.manifest import RAW_SUFFIX
from lipsync import architecture
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source

from .subjects import centred_rects, footage, write_source


def add_small_tenant(folder: Path, repository: Path, name: str, width: int, height: int, frames: int) -> None:
    """A new repository with one tenant, whose graph does nothing, as `lipsync tenant add` makes it, and its encoder.

    folder: takes the source that it is made from.
    """
    repository.mkdir()
    encoder, source = folder / "encoder.onnx", folder / "source"
    onnx.save(architecture.do_nothing_encoder(), encoder)
    add_encoder(repository, files.AUDIO_ENCODER, encoder)
    rects = centred_rects(width, height, frames, height // 2)
    for _ in write_source(source, footage(width, height, frames), rects, architecture.do_nothing()):
        pass
    add_tenant(repository, name, open_source(source), Choices(idle="background"), Serving(), lambda *_: None)


def link_tenants(repository: Path, tenant: str, names: Iterable[str]) -> Iterator[int]:
    """Installs a tenant, and its raw model where it has one, under other names, too; gives the number made so far.

    Raises OSError where the file system takes no hard links, or not so many of one file (ext4: 65,000).
    """
    models = [tenant, *([tenant + RAW_SUFFIX] if (repository / (tenant + RAW_SUFFIX)).is_dir() else [])]
    written, linked = [], []
    for model in models:
        for path in sorted(path for path in (repository / model).rglob("*") if path.is_file()):
            own = path.relative_to(repository / model)
            suffix = model.removeprefix(tenant)
            if path.name in (CONFIG, files.MANIFEST):
                written.append((suffix, own, path.read_text()))
            else:
                linked.append((suffix, own, path))
    for done, name in enumerate(names):
        for model in models:
            (repository / (name + model.removeprefix(tenant)) / "1").mkdir(parents=True)
        for suffix, own, text in written:
            renamed = text.replace(f'"{tenant}{suffix}"', f'"{name}{suffix}"')
            (repository / (name + suffix) / own).write_text(renamed)
        for suffix, own, path in linked:
            os.link(path, repository / (name + suffix) / own)
        yield done + 1
