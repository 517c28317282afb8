"""The dashboard and the alert rules, asked of a real Prometheus that watches the real service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from compositor.errors import LipsyncError
from compositor.metrics import STAGES
from compositor.settings import Settings
from lipsync import architecture
from lipsync.live_client import Account, Recording, Speech, talk
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import ServiceThread, Stack, silent, write_small_source
from ..monitoring import (
    CONFIG,
    DASHBOARD,
    DEPLOY,
    Prometheus,
    about_gpus,
    alerts,
    dashboard_queries,
    prometheus,
    rule_queries,
)
from .test_faults import nan_when_loud
from .waiting import until

TENANTS = ("one", "two", "three")
RATE = 16_000
UNIT_TESTS = Path(__file__).with_name("alerts.yaml")


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed: it comes with the package prometheus"
        # Never where a skip would go unseen.
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory, triton_home: Path) -> Iterator[Stack]:
    """A stack with room for two tenants of three, and two more: one fails when it is loud, one does not load."""
    root = tmp_path_factory.mktemp("crowded")
    repository = root / "repository"
    repository.mkdir()
    onnx.save(architecture.do_nothing_encoder(), root / "encoder.onnx")
    add_encoder(repository, "audio_encoder", root / "encoder.onnx")
    source = write_small_source(root / "source", architecture.do_nothing(), frames=4)
    for name in (*TENANTS, "broken"):
        add_tenant(repository, name, open_source(source), Choices(), Serving(threads=1), silent)
    loud = write_small_source(root / "loud", nan_when_loud(), frames=4)
    add_tenant(repository, "diverges", open_source(loud), Choices(), Serving(threads=1), silent)
    model = repository / "broken" / "1" / "model.onnx"
    model.write_bytes(b"x" * model.stat().st_size)
    with EmbeddedTriton(repository) as triton:
        settings = Settings.model_validate(
            {
                "model_repository": repository,
                "server": {"port": 0},
                "http": {"port": 0},
                "triton": {"endpoints": triton.grpc},
                # Else a machine that is busy with something else would have sessions refused.
                "live": {"max_late": 1},
                "residency": {"max_models": 2, "min_resident_s": 0, "failed_s": 0},
            }
        )
        service = ServiceThread(settings)
        service.start()
        try:
            yield Stack(repository, triton, service)
        finally:
            service.stop()


@pytest.fixture(scope="module")
def watched(crowded: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = {"compositor": crowded.service.http_address, "triton": crowded.triton.metrics}
    with prometheus(program("prometheus"), tmp_path_factory.mktemp("prometheus"), targets) as running:
        yield running


def converse(stack: Stack, tenant: str) -> Account:
    """A live session of a second of speech, noise that is as loud as can be."""
    noise = np.random.default_rng(0).uniform(-1, 1, RATE).astype(np.float32)
    with tempfile.TemporaryFile() as file:
        return talk(stack.service.address, tenant, Speech(noise, RATE), Recording(file), lambda pts: None)


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_every_query_has_an_answer(crowded: Stack, watched: Prometheus) -> None:
    queries = [*dashboard_queries(), *rule_queries()]
    with urllib.request.urlopen(f"http://{crowded.triton.metrics}/metrics", timeout=60) as page:
        if b"\nnv_gpu_" not in page.read():
            queries = [query for query in queries if not about_gpus(query)]

    give_up = time.monotonic() + 120
    missing = watched.unanswered(queries)
    while missing and time.monotonic() < give_up:
        for tenant in TENANTS:
            converse(crowded, tenant)
        converse(crowded, "diverges")
        with pytest.raises(LipsyncError, match="does not load"):
            converse(crowded, "broken")
        missing = watched.unanswered(missing)
    assert missing == []
    # A scrape may lie before what the last session did, or meet a machine that stands still.
    until(lambda: timed(watched) == set(STAGES))
    until(lambda: watched.scraped() == {"compositor", "triton"})


def timed(watched: Prometheus) -> set[str]:
    """The stages that took time."""
    found = watched.ask("query", query="sum by (stage) (lipsync_stage_seconds_count) > 0")["result"]
    return {each["metric"]["stage"] for each in found}


@pytest.mark.triton
def test_the_rules_are_in_force(watched: Prometheus) -> None:
    until(lambda: bool(watched.ask("rules")["groups"]))
    (group,) = watched.ask("rules")["groups"]
    until(lambda: all(rule["health"] == "ok" for rule in watched.ask("rules")["groups"][0]["rules"]))
    assert [rule["name"] for rule in group["rules"]] == [alert["alert"] for alert in alerts()]


def test_every_alert_says_what_it_compares_and_what_is_wrong() -> None:
    assert len(rule_queries()) == len(alerts())
    operations = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for alert in alerts():
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert f"`{alert['alert']}`" in operations


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert tested == {alert["alert"] for alert in alerts()}
    done = subprocess.run(
        [program("promtool"), "test", "rules", UNIT_TESTS.name],
        cwd=UNIT_TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_only_a_gpu_answers_has_the_names_that_triton_documents() -> None:
    # docs/user_guide/metrics.md of triton-inference-server/server, "GPU metrics".
    documented = {
        *("nv_gpu_utilization", "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes"),
        *("nv_gpu_power_usage", "nv_gpu_power_limit", "nv_energy_consumption"),
    }
    asked = {name for query in dashboard_queries() if about_gpus(query) for name in re.findall(r"nv_\w+", query)}
    assert {"nv_gpu_utilization", "nv_gpu_memory_used_bytes"} <= asked <= documented


def test_grafana_finds_what_compose_mounts() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in compose["volumes"])
    provisioning, dashboards = mounts["./grafana/provisioning"], mounts["./grafana/dashboards"]
    assert provisioning == "/etc/grafana/provisioning"
    folder = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((folder / "dashboards" / "dashboards.yaml").read_text())["providers"]
    assert provider["options"]["path"] == dashboards
    home = compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{dashboards}/{DASHBOARD.name}"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [target["datasource"]["uid"] for panel in panels for target in panel.get("targets", [])]
    assert set(asked) == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_provisioning_has_keys_that_grafana_reads() -> None:
    """Those of pkg/services/provisioning/*/types.go of grafana/grafana; others it would pass by in silence."""
    folder = DEPLOY / "grafana" / "provisioning"
    dashboards = yaml.safe_load((folder / "dashboards" / "dashboards.yaml").read_text())
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())
    assert dashboards["apiVersion"] == sources["apiVersion"] == 1
    (provider,) = dashboards["providers"]
    (source,) = sources["datasources"]
    assert provider.keys() == {"name", "type", "allowUiUpdates", "options"}
    assert source.keys() == {"name", "uid", "type", "access", "url", "isDefault", "jsonData"}
    # Else $__rate_interval would be too short, or too long.
    pace = yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"]
    assert source["jsonData"] == {"timeInterval": pace}


def test_the_dashboard_has_keys_that_grafana_reads() -> None:
    """As @grafana/schema 12.4 and 13.2 have them (Dashboard, Panel, Options of the two kinds of panel)."""
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard.keys() <= {
        *("annotations", "description", "editable", "fiscalYearStartMonth", "graphTooltip", "links", "liveNow"),
        *("panels", "preload", "refresh", "schemaVersion", "tags", "templating", "time", "timepicker", "timezone"),
        *("title", "uid", "version", "weekStart"),
    }
    assert dashboard["schemaVersion"] == 42
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", dashboard["uid"])
    options = {
        "row": set[str](),
        "stat": {
            *("reduceOptions", "orientation", "textMode", "colorMode", "graphMode", "justifyMode", "wideLayout"),
            *("percentChangeColorMode", "showPercentChange"),
        },
        "timeseries": {"legend", "tooltip"},
    }
    for panel in dashboard["panels"]:
        assert panel.get("options", {}).keys() == options[panel["type"]]
        assert len({target["refId"] for target in panel.get("targets", [])}) == len(panel.get("targets", []))
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"] in {"short", "s", "percentunit", "decbytes", "watt"}


def test_legends_name_labels_that_their_queries_keep() -> None:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            shown = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            kept = [set(re.split(r",\s*", labels)) for labels in re.findall(r"by \(([^)]*)\)", target["expr"])]
            for labels in kept:
                assert shown <= labels
            assert kept or not re.search(r"\b(sum|min|max)\(", target["expr"]) or not shown


def test_no_panel_lies_on_another() -> None:
    taken = set[tuple[int, int]]()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_the_dashboard_asks_for_nothing_that_only_looks_like_an_answer() -> None:
    queries = dashboard_queries()
    assert len(queries) > 40
    for query in queries:
        assert not re.search(r"or\s+vector|absent", query)


def test_stats_show_no_number_where_nothing_happened(tmp_path: Path) -> None:
    """A quotient of nothing, or its quantile, is NaN, which Grafana would show."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    stats = [target["expr"] for panel in panels if panel["type"] == "stat" for target in panel["targets"]]
    quotients = [query for query in stats if " / " in query or "histogram_quantile" in query]
    assert len(quotients) == 3
    names = ("lateness", "first_picture")
    series = [f'lipsync_{name}_seconds_bucket{{le="{edge}"}}' for name in names for edge in ("1", "+Inf")]
    series += [f'lipsync_pictures_total{{kind="{kind}"}}' for kind in ("speaking", "late", "idle")]
    evaluate(tmp_path, dict.fromkeys(series, "7x10"), {query: {} for query in quotients})


def evaluate(folder: Path, series: dict[str, str], answers: dict[str, dict[str, float]]) -> None:
    """Holds that each query, asked after ten minutes, has these samples: a value for each set of labels. series: a
    sample a minute."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f"round({query.replace('$__rate_interval', '5m')}, 0.001)",
                "eval_time": "10m",
                "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
            }
            for query, samples in answers.items()
        ],
    }
    (folder / "queries.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    command = [program("promtool"), "test", "rules", "queries.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def stat(title: str) -> dict[str, Any]:
    """The panel of the row that is seen first."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    (panel,) = [panel for panel in panels if panel["type"] == "stat" and panel["title"] == title]
    assert panel["gridPos"]["y"] < 5
    return dict(panel)


def test_a_triton_whose_inference_fails_is_not_green_at_a_glance(tmp_path: Path) -> None:
    panel = stat("Triton")
    (target,) = panel["targets"]
    states = {"well": (1, 1), "down": (0, 1), "fails": (1, 0), "gone": (0, 0)}
    series = {
        f'lipsync_triton_{name}{{triton="{triton}", instance="c"}}': f"{value}x10"
        for triton, both in states.items()
        for name, value in zip(("up", "works"), both, strict=True)
    }
    series['lipsync_triton_up{triton="older", instance="c"}'] = "1x10"  # a compositor that tells no more
    shown = {**{triton: min(both) for triton, both in states.items()}, "older": 1}
    evaluate(tmp_path, series, {target["expr"]: {f'{{triton="{triton}"}}': value for triton, value in shown.items()}})
    assert [step["color"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]] == ["red", "green"]


def test_refused_sessions_are_seen_at_a_glance_and_not_among_failed_calls(tmp_path: Path) -> None:
    refused, failed = stat("Refused sessions a minute"), stat("Failed calls a minute")
    full, burst = (target["expr"] for target in refused["targets"])
    series = {
        'lipsync_sessions_refused_total{reason="late"}': "0+3x10",
        'lipsync_sessions_refused_total{reason="max_sessions"}': "0+2x10",
        'lipsync_sessions_refused_total{reason="burst"}': "0+10x10",
        'lipsync_calls_total{method="Speak", status="RESOURCE_EXHAUSTED"}': "0+15x10",
        'lipsync_calls_total{method="WebSocket", status="UNAVAILABLE"}': "0+1x10",
        'lipsync_calls_total{method="Composite", status="RESOURCE_EXHAUSTED"}': "0+1x10",
    }
    evaluate(tmp_path, series, {full: {"{}": 5}, burst: {"{}": 10}, failed["targets"][0]["expr"]: {"{}": 2}})
    # A restart, after which everybody comes back at once, is orange.
    (override,) = refused["fieldConfig"]["overrides"]
    assert override["matcher"] == {"id": "byFrameRefID", "options": refused["targets"][1]["refId"]}
    (thresholds,) = [each["value"] for each in override["properties"] if each["id"] == "thresholds"]
    assert [step["color"] for step in thresholds["steps"]] == ["green", "orange"]
