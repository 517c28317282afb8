"""Part `triton`: how many frames a second Triton itself gives of one tenant, without the compositor.

The project's serving efficiency is the compositor's frames a second over this ceiling, at the same concurrency.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import tritonclient.grpc as wire
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from compositor.blending import CROP_SIZE, ROI_SIZE
from compositor.errors import InferenceFailed
from compositor.manifest import RAW_SUFFIX
from compositor.tenant import Tenant
from lipsync.tritonserver import EmbeddedTriton, default_home, install

from . import perf_analyzer
from .figures import Figure, PartReport, Spread
from .part import Part, Run
from .perf_analyzer import Load, Measured
from .wire import build_visual

Kind: TypeAlias = Literal["fused", "raw"]
TITLE = "Triton's ceiling"
_ROUNDS = 3
_STEPS = 4
_OUTPUT_BYTES: dict[Kind, int] = {"fused": CROP_SIZE * CROP_SIZE * 3, "raw": ROI_SIZE * ROI_SIZE * 3 * 4}
_log = logging.getLogger(__name__)


def part(repository: Path, name: str, concurrencies: Sequence[int], batch: int | None) -> Part:
    """The part for an installed tenant. batch: frames a request; the tenant's largest batch where None."""
    return Part("triton", TITLE, partial(_run, repository=repository, name=name, sweep=concurrencies, batch=batch))


def _run(run: Run, *, repository: Path, name: str, sweep: Sequence[int], batch: int | None) -> PartReport:
    tenant = Tenant(repository, name)
    size = batch or tenant.manifest.max_batch_size
    analyzer = perf_analyzer.install(install(default_home(), _log.info), _log.info)
    inputs = write_inputs(tenant, run.folder)
    found: dict[tuple[int, str], list[Measured]] = {}
    rounds = 1 if run.quick else _ROUNDS
    with EmbeddedTriton(repository) as triton:
        load_models(triton.grpc, name, name + RAW_SUFFIX)
        loads = [
            load_of(tenant, kind, triton.grpc, inputs[kind], size, concurrency)
            for concurrency in sweep
            for kind in _OUTPUT_BYTES
        ]
        for place in range(rounds * len(loads)):
            load = loads[place % len(loads)]
            kind = "raw" if load.model.endswith(RAW_SUFFIX) else "fused"
            found.setdefault((load.concurrency, kind), []).append(perf_analyzer.measure(analyzer, load))
            run.progress("perf_analyzer", place + 1, rounds * len(loads))
    how = (
        f"perf_analyzer from {perf_analyzer.WHEEL} on the tenant `{name}`, {tenant.manifest.crops} crops, {size} "
        "frames a request, inputs and outputs in system shared memory; the compositor does not run."
    )
    return PartReport("triton", TITLE, how, "frames a second", list(_figures(found)))


def _figures(found: dict[tuple[int, str], list[Measured]]) -> Iterator[Figure]:
    for (concurrency, kind), measured in found.items():
        case = f"concurrency {concurrency}"
        throughput = Spread.of(each.inferences_per_s for each in measured)
        yield Figure(case, kind, "frames a second", "fps", throughput)
        yield Figure(case, kind, "latency of a request, p50", "ms", Spread.of(each.latency_ms for each in measured))


def load_of(tenant: Tenant, kind: Kind, address: str, data: Path, batch: int, concurrency: int) -> Load:
    """What perf_analyzer shall do with one of the tenant's models; `data` is its file of `write_inputs`."""
    model = tenant.name + (RAW_SUFFIX if kind == "raw" else "")
    return Load(model, address, data, batch, concurrency, batch * _OUTPUT_BYTES[kind])


def write_inputs(tenant: Tenant, folder: Path) -> dict[Kind, Path]:
    """perf_analyzer's input files for both of the tenant's models: a few of its frames, audio drawn at random."""
    random = np.random.default_rng(0)
    steps: dict[Kind, list[dict[str, Any]]] = {"fused": [], "raw": []}
    for number in range(min(_STEPS, tenant.frames)):
        audio = _content(random.standard_normal((32, 16, 16), np.float32))
        crop = tenant.crop(number)
        resident = tenant.manifest.crops == "resident"
        subject = (
            {"frame_index": _content(np.array([number], np.int32))}
            if resident
            else {"crop": _content(tenant.crop_planes(number))}
        )
        steps["fused"].append({**subject, "audio": audio})
        steps["raw"].append({"visual": _content(build_visual(crop[None])[0]), "audio": audio})
    paths = {}
    for kind, data in steps.items():
        paths[kind] = folder / f"{kind}.json"
        paths[kind].write_text(json.dumps({"data": data}))
    return paths


def _content(values: NDArray[Any]) -> dict[str, Any]:
    return {"b64": base64.b64encode(values.tobytes()).decode(), "shape": list(values.shape)}


def load_models(address: str, *models: str) -> None:
    """Has Triton load models. Raises InferenceFailed."""
    server = wire.InferenceServerClient(address)
    try:
        for model in models:
            server.load_model(model)
    except InferenceServerException as error:
        raise InferenceFailed(f"Triton does not load {models[0]!r}: {error.message()}") from error
    finally:
        server.close()
