"""The dashboards are what their description says, and what Grafana needs; no Grafana is asked."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
from typing import Any

import pytest
import yaml

from deploy.grafana.build import DASHBOARDS, FOLDER, main, render
from deploy.grafana.dashboard import Dashboard
from tests.deploy.prometheus.queries import known_series, series_in

PROVISIONING = FOLDER.parent / "provisioning"
PROMETHEUS = FOLDER.parents[1] / "prometheus"
# What each kind of panel cannot do without.
OPTIONS = {
    "timeseries": {"legend", "tooltip"},
    "stat": {"reduceOptions", "colorMode", "graphMode", "textMode", "orientation", "justifyMode"},
    "bargauge": {"reduceOptions", "displayMode", "orientation", "showUnfilled", "valueMode"},
    "heatmap": {"calculate", "yAxis", "color", "cellGap", "filterValues", "tooltip", "legend", "rowsFrame"},
    "table": {"showHeader", "cellHeight", "footer"},
}
UNITS = {"s", "short", "percentunit", "bytes", "Bps", "reqps", "ops"}
VARIABLE = re.compile(r"\$\{?(\w+)")


@pytest.fixture(params=DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def dashboard(request: pytest.FixtureRequest) -> Dashboard:
    found: Dashboard = request.param
    return found


@pytest.fixture
def description(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana reads it."""
    read: dict[str, Any] = json.loads((FOLDER / f"{dashboard.uid}.json").read_text())
    return read


def panels_of(description: dict[str, Any]) -> list[dict[str, Any]]:
    """All but the headings of rows."""
    return [panel for panel in description["panels"] if panel["type"] != "row"]


def test_the_committed_files_are_up_to_date() -> None:
    """`python -m deploy.grafana.build` makes them so."""
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == {
        f"{dashboard.uid}.json": render(dashboard) for dashboard in DASHBOARDS
    }


def test_they_can_be_built_elsewhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["build", str(tmp_path)])
    main()
    assert {path.stem for path in tmp_path.iterdir()} == {dashboard.uid for dashboard in DASHBOARDS}


def test_a_dashboard_has_what_grafana_and_its_links_need(description: dict[str, Any]) -> None:
    assert re.fullmatch(r"baton-[a-z]+", description["uid"])
    assert description["title"].startswith("Baton / ")
    assert description["tags"] == ["baton"]
    assert description["schemaVersion"] >= 36
    (link,) = description["links"]
    assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == ("dashboards", ["baton"], True, True)
    assert "id" not in description, "ids belong to one installation"
    for field in ("annotations", "templating", "time", "timepicker", "refresh", "editable", "version", "graphTooltip"):
        assert field in description


def test_ids_are_unique_and_the_grid_is_filled_without_overlap(description: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in description["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in description["panels"]:
        grid = panel["gridPos"]
        cells = set(itertools.product(range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])))
        assert not cells & taken, panel["title"]
        assert grid["x"] >= 0
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert len(taken) == 24 * height, "a row has a gap"


def test_titles_of_a_dashboard_are_told_apart(description: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in description["panels"]]
    assert len(titles) == len(set(titles))


def test_a_panel_has_unit_legend_and_description(description: dict[str, Any]) -> None:
    for panel in panels_of(description):
        title = panel["title"]
        assert panel["description"].endswith("."), title
        options, defaults = panel["options"], panel["fieldConfig"]["defaults"]
        assert OPTIONS[panel["type"]] <= options.keys(), title
        unit = options["yAxis"]["unit"] if panel["type"] == "heatmap" else defaults["unit"]
        assert unit in UNITS or unit.startswith("suffix:"), title
        for target in panel["targets"]:
            assert target["legendFormat"], title
            by = re.search(r"by \(([^)]*)\)", target["expr"])
            grouped = {label.strip() for label in by[1].split(",")} if by and panel["type"] != "table" else set()
            # What several lines have in their legends are labels that the query keeps.
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= grouped or by is None, title
            assert used or grouped <= {"model", "le"}, f"{title}: lines that look alike"


def test_thresholds_begin_with_a_base_and_rise(description: dict[str, Any]) -> None:
    for panel in panels_of(description):
        thresholds = panel["fieldConfig"]["defaults"].get("thresholds")
        if thresholds is not None:
            values = [step["value"] for step in thresholds["steps"]]
            assert values[0] is None
            assert values[1:] == sorted(values[1:]), panel["title"]


def test_every_query_goes_to_the_chosen_datasource_and_uses_known_variables(description: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in description["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    used: set[str] = set()
    for panel in panels_of(description):
        assert panel["datasource"] == chosen
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])
        for target in panel["targets"]:
            assert target["datasource"] == chosen
            used |= set(VARIABLE.findall(target["expr"]))
    assert used - {"__rate_interval"} == variables.keys() - {"datasource"}


def test_every_series_is_there(description: dict[str, Any]) -> None:
    exprs = [target["expr"] for panel in panels_of(description) for target in panel["targets"]]
    exprs += [annotation["expr"] for annotation in description["annotations"]["list"]]
    exprs += [variable["definition"] for variable in description["templating"]["list"] if "definition" in variable]
    for expr in exprs:
        assert series_in(expr), expr
        assert series_in(expr) <= known_series(), expr


def test_columns_of_a_table_have_headings() -> None:
    (table,) = [panel for row in DASHBOARDS[0].rows for panel in row.panels if panel.kind == "table"]
    merge, organize = table.to_json(1, 0, 0)["transformations"]
    assert merge["id"] == "merge"
    names = organize["options"]["renameByName"]
    assert names["worker"] == "Worker"
    assert [names[f"Value #{ref}"] for ref in "ABC"] == ["Up", "Running", "Waiting"]
    assert all(target["instant"] and target["format"] == "table" for target in table.to_json(1, 0, 0)["targets"])


def test_uids_are_unique() -> None:
    assert len({dashboard.uid for dashboard in DASHBOARDS}) == len(DASHBOARDS)


class TestProvisioning:
    def test_the_datasource_scrapes_as_prometheus_does(self) -> None:
        (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
        assert source["type"] == "prometheus"
        assert source["isDefault"]
        interval = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
        assert source["jsonData"]["timeInterval"] == interval

    def test_dashboards_come_from_files(self) -> None:
        (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "baton.yml").read_text())["providers"]
        assert provider["type"] == "file"
        assert pathlib.PurePosixPath(provider["options"]["path"]).is_absolute()
