"""What the operator's dashboard and alert rules ask, and a Prometheus to ask."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "lipsync.json"
RULES = DEPLOY / "prometheus" / "alerts.yaml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yaml"
_CONDITION = re.compile(r"(?P<query>.+) (?P<comparison>[<>]) (?P<limit>[0-9.]+)", re.DOTALL)
_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')


def dashboard_queries() -> list[str]:
    """Every query of the dashboard, over a window that a young Prometheus has samples for."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "1m") for query in queries]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> list[str]:
    """What each alert compares with its limit."""
    matches = [_CONDITION.fullmatch(alert["expr"]) for alert in alerts()]
    return [match["query"] for match in matches if match]


def about_gpus(query: str) -> bool:
    """Whether only a Triton with a GPU has an answer."""
    return "nv_gpu_" in query


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus that runs, by its URL."""

    url: str

    def await_ready(self) -> None:
        """It listens before it answers: 503 until it has read its storage."""
        give_up = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=30):
                    return
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > give_up:
                    raise
            time.sleep(0.05)

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of the HTTP API."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """The numbers that a query gives now, without those that are none."""
        found = [float(result["value"][1]) for result in self.ask("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def unanswered(self, queries: Iterable[str]) -> list[str]:
        return [query for query in queries if not self.values(query)]

    def scraped(self) -> set[str]:
        """The jobs all of whose targets answer."""
        targets = self.ask("targets")["activeTargets"]
        return {each["labels"]["job"] for each in targets} - {
            each["labels"]["job"] for each in targets if each["health"] != "up"
        }


@contextlib.contextmanager
def prometheus(program: str, folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """A Prometheus with the deployed configuration, but for its pace and where the jobs' targets are."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(RULES)]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    command += ["--web.listen-address=127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        emptying = threading.Thread(target=process.stderr.read)
        try:
            found = (_LISTENING.search(line) for line in process.stderr)
            address = next(match[1] for match in found if match)
            # A pipe that nobody empties would stop it.
            emptying.start()
            found_one = Prometheus(f"http://{address}")
            found_one.await_ready()
            yield found_one
        finally:
            process.terminate()
            if emptying.ident:
                emptying.join()
