"""The files of deploy/prometheus: promtool takes them, every series that they read is there, every alert is tried."""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from deploy.prometheus import build
from tests.deploy.prometheus.queries import FOLDER, RULE_FILES, known_series, rules, series_in, unfiltered
from tests.tools import tool

TESTS = sorted(pathlib.Path(__file__).parent.glob("*.yml"))
DOCS = FOLDER.parents[1] / "docs" / "monitoring.md"
ALERTS = [rule for rule in rules() if "alert" in rule]


def promtool(*arguments: str | pathlib.Path) -> str:
    """What it says; fails where it finds something wrong."""
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases() -> Iterator[tuple[str, bool]]:
    """(alert, whether it is to fire) of every test of every file."""
    for path in TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case.get("promql_expr_test", ()):
                (alert,) = re.findall(r'alertname="(\w+)"', check["expr"])
                yield alert, bool(check["exp_samples"])


def test_the_configuration_and_the_rules_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", FOLDER / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", *RULE_FILES)


def test_the_operator_gets_the_same_rules() -> None:
    """`python -m deploy.prometheus.build` makes it so."""
    assert build.FILE.read_text() == build.render()
    for path, made in zip(RULE_FILES, yaml.safe_load_all(build.FILE.read_text()), strict=True):
        assert made["kind"] == "PrometheusRule"
        assert made["spec"] == yaml.safe_load(path.read_text())


def test_alerts_fire_where_they_should_and_only_there() -> None:
    promtool("test", "rules", *TESTS)


def test_every_alert_is_tried_both_ways() -> None:
    names = {rule["alert"] for rule in ALERTS}
    assert {alert for alert, fires in cases() if fires} == names
    assert {alert for alert, fires in cases() if not fires} == names


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_reads_only_series_that_are_there(rule: dict[str, Any]) -> None:
    read = series_in(rule["expr"])
    assert read
    assert read <= known_series()


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, anchor = rule["annotations"]["runbook"].split("#")
    assert page == "docs/monitoring.md"
    assert anchor == rule["alert"].lower()
    assert f"### {rule['alert']}\n" in DOCS.read_text()


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    assert re.findall(r"^### (Baton\w+)$", DOCS.read_text(), re.MULTILINE) == [rule["alert"] for rule in ALERTS]


def test_comparisons_are_undone_outside_of_selectors_only() -> None:
    assert unfiltered('a{b!="c>d"} > 1 and e >= 2') == 'a{b!="c>d"} > bool 1 and e >= bool 2'


def test_series_are_found_in_expressions() -> None:
    expr = 'sum by (model) (rate(baton_x_total{reason="baton_y"}[5m])) / model:baton_z:rate5m > up'
    assert series_in(expr) == {"baton_x_total", "model:baton_z:rate5m", "up"}
