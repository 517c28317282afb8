"""How the service fares, for people and for `lipsync top`: reports go in, JSON comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..metrics import Metrics
from ..residency.models import ModelReport
from ..triton.endpoint import EndpointReport


def describe(reports: Sequence[EndpointReport], metrics: Metrics) -> dict[str, Any]:
    """The Triton servers with what was counted of each, and their models, those with the most uses first."""
    models = [(report.endpoint, model) for report in reports for model in report.models]
    models.sort(key=lambda each: (-each[1].uses, each[1].name))
    return {
        "endpoints": [_endpoint(report, metrics) for report in reports],
        "models": [_model(endpoint, model) for endpoint, model in models],
    }


def _endpoint(report: EndpointReport, metrics: Metrics) -> dict[str, Any]:
    observer = metrics.observers.get(report.endpoint)
    return {
        "endpoint": report.endpoint,
        "up": report.up,
        "circuit": report.circuit.value,
        "room": report.room,
        "leases": report.leases,
        "counts": observer.counts if observer else {},
        "devices": [{"device": name, **held} for name, held in observer.devices.items()] if observer else [],
    }


def _model(endpoint: str, model: ModelReport) -> dict[str, Any]:
    return {"endpoint": endpoint, **dataclasses.asdict(model), "state": model.state.value}
