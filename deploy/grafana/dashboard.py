"""One dashboard: rows of panels laid out on Grafana's grid, the variables that its queries use, and links to others."""

from __future__ import annotations

import dataclasses

from deploy.grafana.panels import DATASOURCE, Json, Panel

_GRID_COLUMNS = 24
# Grafana 10.3's; later ones migrate it.
_SCHEMA_VERSION = 39
_TAG = "baton"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading, from left to right and then below."""

    title: str
    panels: tuple[Panel, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """
    Attributes:
        uid: stays the same for ever: links and bookmarks use it.
        worker_role: role of the workers that `$worker` chooses among; empty where nothing is chosen.
    """

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    worker_role: str = ""

    def to_json(self) -> Json:
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": [_TAG],
            "schemaVersion": _SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "fiscalYearStartMonth": 0,
            "graphTooltip": 1,
            "timezone": "browser",
            "weekStart": "",
            "time": {"from": "now-1h", "to": "now"},
            "timepicker": {},
            "refresh": "10s",
            "links": [_LINK],
            "annotations": {"list": [_JOINS]},
            "templating": {"list": self._variables()},
            "panels": self._panels(),
        }

    def _variables(self) -> list[Json]:
        datasource = {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
            "options": [],
            "refresh": 1,
            "regex": "",
            "hide": 0,
            "includeAll": False,
            "multi": False,
        }
        variables = [datasource, _label_variable("model", "Model", "label_values(baton_build_info, model)")]
        if self.worker_role:
            workers = f'baton_build_info{{role="{self.worker_role}", model=~"$model"}}'
            variables.append(_label_variable("worker", "Worker", f"label_values({workers}, worker)"))
        return variables

    def _panels(self) -> list[Json]:
        panels: list[Json] = []
        y = 0
        for row in self.rows:
            heading = {"h": 1, "w": _GRID_COLUMNS, "x": 0, "y": y}
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "row",
                    "title": row.title,
                    "collapsed": False,
                    "gridPos": heading,
                    "panels": [],
                }
            )
            y += 1
            x = height = 0
            for panel in row.panels:
                if x + panel.width > _GRID_COLUMNS:
                    y, x, height = y + height, 0, 0
                panels.append(panel.to_json(len(panels) + 1, x, y))
                x, height = x + panel.width, max(height, panel.height)
            y += height
        return panels


def _label_variable(name: str, label: str, query: str) -> Json:
    """A variable that holds a label's values, all of them unless some are chosen."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": f"variable-{name}", "qryType": 1},
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Also finds series of processes that are scraped without the label.
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
        "hide": 0,
        "skipUrlSync": False,
    }


_LINK: Json = {
    "type": "dashboards",
    "title": "Baton",
    "tags": [_TAG],
    "asDropdown": False,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "icon": "external link",
    "tooltip": "",
    "url": "",
}
_JOINS: Json = {
    "name": "Workers that joined",
    "datasource": DATASOURCE,
    "enable": True,
    "hide": False,
    "iconColor": "blue",
    "expr": 'sum by (worker_role) (increase(baton_worker_joins_total{model=~"$model"}[$__rate_interval])) > 0',
    "step": "15s",
    "titleFormat": "{{worker_role}} worker joined",
    "textFormat": "",
    "tagKeys": "worker_role",
    "useValueForTime": False,
}
