"""The operator's view of a model repository: add, list and remove tenants, add encoders."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx

from compositor import manifest as files
from compositor.catalogue import CONFIG
from compositor.errors import InvalidInput, TenantNotFound
from compositor.features import ENCODER_BATCH
from compositor.manifest import check_name
from compositor.tenant import CROP_BYTES

from . import model_config
from .fusing import canonical
from .model_check import load_dynamic, probe
from .model_config import Kind, session_parameters
from .model_interface import ENCODER
from .model_memory import backend_bytes
from .preparation import Choices, Graph, Report, prepare
from .sources import Source
from .staging import install, remove, staging

RAW_TENSORS = ("visual", "audio", "output")


@dataclass(frozen=True)
class Serving:
    """How Triton runs a model."""

    kind: Kind = "auto"
    threads: int = 1


def free_name(repository: Path, name: str) -> None:
    """Raises InvalidInput unless a model of that name may be installed."""
    check_name(name)
    if name == files.AUDIO_ENCODER:
        raise InvalidInput(f"{name!r} is the name of the shared audio encoder; choose another")
    if os.path.lexists(repository / name):
        raise InvalidInput(f"{name!r} exists already in {repository}; choose another name, or remove it first")


def add_tenant(
    repository: Path,
    name: str,
    source: Source,
    choices: Choices,
    serving: Serving,
    report: Report,
    names: dict[str, str] | None = None,
) -> files.Manifest:
    """Checks, prepares and installs a tenant; whatever goes wrong, nothing of it stays behind.

    names: tensor names by role (visual, audio, output) where shapes do not tell. Raises InvalidInput.
    """
    free_name(repository, name)
    check_name(choices.encoder, "encoder")
    report("check", 0, 1)
    checked = probe(source.model, choices.max_batch_size, names=names or {})
    uploaded = checked.model
    tensors = (uploaded.inputs[0], uploaded.inputs[1], uploaded.output)
    graph = Graph(load_dynamic(source.model, uploaded), tensors, uploaded.sha256)
    report("check", 1, 1)
    _check_space(repository, source, graph)
    encoder = repository / choices.encoder / "1" / files.MODEL
    with staging(repository, name) as folder:
        built, raw = folder / name, folder / (name + files.RAW_SUFFIX)
        for model in (built, raw):
            (model / "1").mkdir(parents=True)
        manifest = prepare(built / "1", name, source, graph, encoder, choices, report)
        onnx.save(canonical(graph.model, dict(zip(tensors, RAW_TENSORS, strict=True))), raw / "1" / files.MODEL)
        _configure(built, raw, manifest, serving, report)
        install(built, [raw], repository)
    return manifest


def _configure(built: Path, raw: Path, manifest: files.Manifest, serving: Serving, report: Report) -> None:
    """Writes config.pbtxt of both of a tenant's models, with the memory that each was measured to take."""
    batch, kind, threads = manifest.max_batch_size, serving.kind, serving.threads
    taken = []
    for number, model in enumerate((built, raw)):
        report("memory", number, 2)
        taken.append(backend_bytes(model / "1" / files.MODEL, batch, session_parameters(threads)))
    report("memory", 2, 2)
    (built / CONFIG).write_text(
        model_config.tenant_config(built.name, manifest.crops, batch, kind, threads, measured_bytes=taken[0])
    )
    (raw / CONFIG).write_text(model_config.raw_config(raw.name, batch, kind, threads, taken[1]))


def _check_space(repository: Path, source: Source, graph: Graph) -> None:
    """Refuses early what cannot fit: crops, patches, scans (at most two bits a pixel) and the weights twice."""
    width, height = source.frames.size
    patches = sum((rect.width + 80) * (rect.height + 32) * 3 for rect in source.rects)
    frames = len(source.rects) * (CROP_BYTES + width * height // 4)
    needed = patches + frames + 2 * graph.model.ByteSize()
    existing = next(path for path in (repository, *repository.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InvalidInput(
            f"{repository}: {free >> 20} MiB free, but the tenant takes about {needed >> 20} MiB; free some space"
        )


def remove_tenant(repository: Path, name: str) -> None:
    """Removes a tenant and its raw model, however damaged. Raises InvalidInput or TenantNotFound."""
    check_name(name)
    if not is_tenant(repository / name):
        raise TenantNotFound(f"no tenant named {name!r} is installed in {repository}", field="tenant")
    remove(repository, [model for model in (name, name + files.RAW_SUFFIX) if (repository / model).exists()])


def is_tenant(directory: Path) -> bool:
    """Whether the directory holds a tenant, whole or damaged, and no encoder: any of a tenant's own files tells."""
    return any((directory / "1" / file).exists() for file in (files.MANIFEST, *files.FILES - {files.MODEL}))


def disk_bytes(repository: Path, name: str) -> int:
    """Bytes that a tenant takes on disk, its raw model included."""
    return sum(
        path.stat().st_size
        for model in (name, name + files.RAW_SUFFIX)
        for path in (repository / model).rglob("*")
        if path.is_file()
    )


def add_encoder(repository: Path, name: str, path: Path, *, replace: bool = False) -> None:
    """Checks and installs an audio encoder under `name`. Raises InvalidInput."""
    check_name(name, "encoder")
    target = repository / name
    if is_tenant(target):
        raise InvalidInput(f"{name!r} is a tenant in {repository}; choose another name")
    if os.path.lexists(target) and not replace:
        raise InvalidInput(f"{name!r} exists already in {repository}; use --replace to install it anew")
    checked = probe(path, 4, interface=ENCODER)
    model = load_dynamic(path, checked.model)
    with staging(repository, name) as folder:
        built = folder / name
        (built / "1").mkdir(parents=True)
        named = {checked.model.inputs[0]: "mel_spectrogram", checked.model.output: "audio_features"}
        onnx.save(canonical(model, named), built / "1" / files.MODEL)
        taken = backend_bytes(built / "1" / files.MODEL, ENCODER_BATCH, session_parameters(1))
        (built / CONFIG).write_text(model_config.encoder_config(name, measured_bytes=taken))
        install(built, [], repository, replace=replace)
