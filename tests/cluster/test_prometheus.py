"""A real Prometheus with Baton's configuration scrapes a real cluster: it finds all of it, and every query has data."""

from __future__ import annotations

import contextlib
import datetime
import pathlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from baton.client import Client
from baton.errors import BatonError
from deploy.grafana.build import DASHBOARDS
from deploy.grafana.dashboard import Dashboard
from tests.cluster.harness import ClusterUnderTest
from tests.deploy.prometheus.queries import FOLDER, rules, unfiltered, with_variables
from tests.tools import tool

SCRAPE_INTERVAL = "500ms"
TIMEOUT_S = 30.0
LONG_PROMPT = list(range(100, 300))


class Prometheus:
    """A running server."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=f"http://{address}/api/v1")

    def get(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[Any]:
        result: list[Any] = self.get("/query", query=expr)["result"]
        return result

    def value(self, expr: str) -> float:
        """Of the only series; NaN where there is none."""
        result = self.query(expr)
        assert len(result) <= 1
        return float(result[0]["value"][1]) if result else float("nan")

    def until(self, condition: Callable[[], bool]) -> None:
        """Asks until it is so: Prometheus tells nobody of what it has scraped or evaluated."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {TIMEOUT_S:g} s"
            time.sleep(0.05)

    def until_evaluated(self) -> None:
        """Waits until every group of rules was evaluated once more."""
        now = datetime.datetime.now(datetime.UTC)

        def evaluated_since() -> bool:
            groups = self.get("/rules")["groups"]
            return all(datetime.datetime.fromisoformat(group["lastEvaluation"]) > now for group in groups)

        self.until(evaluated_since)

    def close(self) -> None:
        self._http.close()


def adapted_config(url: str) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml for another router, and in a hurry."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], SCRAPE_INTERVAL)
    config["rule_files"] = [str(FOLDER / pattern) for pattern in config["rule_files"]]
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    discovery.update(url=f"{url}/targets", refresh_interval=SCRAPE_INTERVAL)
    return config


@contextlib.contextmanager
def running_prometheus(folder: pathlib.Path, url: str) -> Iterator[Prometheus]:
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(adapted_config(url)))
    flags = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"]
    log: list[str] = []
    with subprocess.Popen([tool("prometheus"), *flags], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = _address(process.stderr, log)
            # What is not read would hold it up in the end.
            reading = threading.Thread(target=log.extend, args=[process.stderr])
            reading.start()
            with contextlib.closing(Prometheus(address)) as prometheus:
                yield prometheus
            process.terminate()
            reading.join()
        finally:
            process.kill()


def _address(lines: Iterable[str], log: list[str]) -> str:
    """Where it says that it listens; the lines until then go to `log`."""
    for line in lines:
        log.append(line)
        if found := re.search(r"Listening on\"? address=(\S+)", line):
            return found[1]
    raise AssertionError("".join(log))


def send_requests(cluster: ClusterUnderTest) -> None:
    """One of each kind: prefilled remotely, cached, prefilled locally, of two choices, cancelled, refused."""
    with Client(cluster.target) as client:
        for prompt in (LONG_PROMPT, LONG_PROMPT, "hi"):
            client.generate(prompt, max_tokens=4, ignore_eos=True)
        client.generate("hello", n=2, max_tokens=3)
        stream = client.stream("once upon a time", max_tokens=2000, ignore_eos=True)
        next(stream)
        stream.close()
        with pytest.raises(BatonError):
            client.generate("hi", n=99)


@pytest.fixture(scope="module")
def prometheus(demo_cluster: ClusterUnderTest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Has scraped every process twice since the last request ended, and evaluated every rule on that."""
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), demo_cluster.url) as prometheus:
        prometheus.until(lambda: prometheus.value('count(up{job="baton"} == 1)') == 3)
        send_requests(demo_cluster)
        end = f"{time.time():.3f}"
        prometheus.until(lambda: prometheus.value(f"min(count_over_time(up[1m])) and min(timestamp(up)) > {end}") >= 2)
        # Twice, since rules read what other rules recorded.
        prometheus.until_evaluated()
        prometheus.until_evaluated()
        yield prometheus


def test_every_process_is_discovered_with_its_labels(prometheus: Prometheus, demo_cluster: ClusterUnderTest) -> None:
    workers = {(w["role"], w["name"], w["metrics"]) for w in demo_cluster.description["workers"]}
    router = ("router", "router", demo_cluster.url.removeprefix("http://"))
    found = prometheus.query('up{job="baton", model="demo"}')
    assert {(s["metric"]["role"], s["metric"]["worker"], s["metric"]["instance"]) for s in found} == workers | {router}


def test_requests_are_counted_once(prometheus: Prometheus) -> None:
    assert prometheus.value('sum(baton_requests_total{outcome="cancelled"})') >= 1
    assert prometheus.value('sum(baton_requests_rejected_total{reason="invalid_argument"})') >= 1
    prompts = prometheus.value("sum(baton_prompt_tokens_total)")
    assert prometheus.value("sum(baton_prompt_tokens_by_source_total)") == prompts
    assert prometheus.value('baton_prompt_tokens_by_source_total{source="kv_transfer"}') >= len(LONG_PROMPT) - 16
    assert prometheus.value("sum(baton_prompt_tokens_cached_total)") >= len(LONG_PROMPT) - 16


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_every_query_of_a_dashboard_has_data(prometheus: Prometheus, dashboard: Dashboard) -> None:
    queries = {query.expr for row in dashboard.rows for panel in row.panels for query in panel.queries}
    assert [expr for expr in sorted(queries) if not prometheus.query(with_variables(expr))] == []


def test_every_variable_and_annotation_of_the_dashboards_has_data(prometheus: Prometheus) -> None:
    for dashboard in DASHBOARDS:
        description = dashboard.to_json()
        for variable in description["templating"]["list"][1:]:
            ((selector, label),) = re.findall(r"label_values\((.+), (\w+)\)", variable["definition"])
            found = prometheus.query(with_variables(selector))
            assert found, variable
            assert all(label in series["metric"] for series in found), variable
        for annotation in description["annotations"]["list"]:
            assert prometheus.query(unfiltered(with_variables(annotation["expr"]))), annotation


def test_every_rule_is_evaluated_and_has_data(prometheus: Prometheus) -> None:
    evaluated = [rule for group in prometheus.get("/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in evaluated} == {rule.get("record") or rule["alert"] for rule in rules()}
    assert [rule["name"] for rule in evaluated if rule["health"] != "ok"] == []
    recorded = [rule["record"] for rule in rules() if "record" in rule]
    assert [name for name in recorded if not prometheus.query(name)] == []
    alerting = [rule for rule in rules() if "alert" in rule]
    assert [rule["alert"] for rule in alerting if not prometheus.query(unfiltered(rule["expr"]))] == []


def test_a_healthy_cluster_does_not_alert(prometheus: Prometheus) -> None:
    assert prometheus.query('ALERTS{alertstate="firing", severity="critical"}') == []
