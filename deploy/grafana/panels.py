"""What a panel shows, and the JSON that Grafana 10 and later want for it. Units are Grafana's ids: s, bytes, reqps."""

from __future__ import annotations

import abc
import dataclasses
import string
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

Json: TypeAlias = "dict[str, Any]"

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
_REDUCE_LAST: Json = {"calcs": ["lastNotNull"], "fields": "", "values": False}


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """
    Attributes:
        expr: PromQL.
        legend: Grafana's template, such as "{{worker}}".
    """

    expr: str
    legend: str

    def to_json(self, ref_id: str, **more: Any) -> Json:
        target = {"refId": ref_id, "datasource": DATASOURCE, "editorMode": "code", "expr": self.expr}
        return target | {"legendFormat": self.legend, "range": True, "instant": False} | more


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Panel(abc.ABC):
    """
    Attributes:
        description: what is seen and when to worry; shown when the mouse is over the panel's corner.
        unit: of the values.
        thresholds: value from which on a colour holds; below the first it is the base colour.
        base: colour below all thresholds.
        maximum: upper end of the axis; None lets Grafana choose.
        width, height: of the grid's 24 columns, and in its rows.
    """

    kind: ClassVar[str]

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str
    thresholds: tuple[tuple[float, str], ...] = ()
    base: str = "green"
    maximum: float | None = None
    decimals: int | None = None
    width: int = 8
    height: int = 8

    def to_json(self, panel_id: int, x: int, y: int) -> Json:
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": DATASOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": self._defaults(), "overrides": self._overrides()},
            "options": self._options(),
            "targets": self._targets(),
            "transformations": self._transformations(),
        }

    def _defaults(self) -> Json:
        steps: list[Json] = [{"color": self.base, "value": None}]
        steps += [{"color": colour, "value": value} for value, colour in self.thresholds]
        defaults: Json = {
            "unit": self.unit,
            "min": 0,
            "mappings": [],
            "thresholds": {"mode": "absolute", "steps": steps},
            "color": {"mode": "thresholds"},
        }
        if self.maximum is not None:
            defaults["max"] = self.maximum
        if self.decimals is not None:
            defaults["decimals"] = self.decimals
        return defaults

    def _overrides(self) -> list[Json]:
        return []

    @abc.abstractmethod
    def _options(self) -> Json:
        """What only this kind of panel has."""

    def _targets(self) -> list[Json]:
        return [query.to_json(ref_id) for query, ref_id in zip(self.queries, string.ascii_uppercase, strict=False)]

    def _transformations(self) -> list[Json]:
        return []


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimeSeries(Panel):
    """Lines over time. Thresholds are drawn as lines.

    Attributes:
        stacked: whether the lines add up.
        dashed: legends of lines that are limits rather than measurements.
    """

    kind: ClassVar[str] = "timeseries"

    stacked: bool = False
    dashed: tuple[str, ...] = ()

    def _defaults(self) -> Json:
        # Zero-argument super() does not work in a dataclass with slots.
        return Panel._defaults(self) | {
            "color": {"mode": "palette-classic"},
            "custom": {
                "drawStyle": "line",
                "lineInterpolation": "linear",
                "lineWidth": 1,
                "fillOpacity": 30 if self.stacked else 8,
                "gradientMode": "none",
                "showPoints": "never",
                "spanNulls": False,
                "axisPlacement": "auto",
                "stacking": {"mode": "normal" if self.stacked else "none", "group": "A"},
                "thresholdsStyle": {"mode": "dashed" if self.thresholds else "off"},
            },
        }

    def _overrides(self) -> list[Json]:
        properties = [
            {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}},
        ]
        return [{"matcher": {"id": "byName", "options": name}, "properties": properties} for name in self.dashed]

    def _options(self) -> Json:
        return {
            "legend": {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stat(Panel):
    """One number, coloured by its thresholds, with its recent course behind it."""

    kind: ClassVar[str] = "stat"

    width: int = 3
    height: int = 4

    def _defaults(self) -> Json:
        # A quantile of nothing is NaN.
        nothing = {"type": "special", "options": {"match": "null+nan", "result": {"text": "-", "index": 0}}}
        return Panel._defaults(self) | {"mappings": [nothing]}

    def _options(self) -> Json:
        return {
            "reduceOptions": _REDUCE_LAST,
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "auto",
            "wideLayout": True,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BarGauge(Panel):
    """The present value of each series as a bar."""

    kind: ClassVar[str] = "bargauge"

    def _options(self) -> Json:
        return {
            "reduceOptions": _REDUCE_LAST,
            "displayMode": "basic",
            "orientation": "horizontal",
            "showUnfilled": True,
            "valueMode": "color",
            "namePlacement": "auto",
            "sizing": "auto",
            "minVizWidth": 8,
            "minVizHeight": 16,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap(Panel):
    """How a histogram's values are spread over time; the unit is that of the buckets."""

    kind: ClassVar[str] = "heatmap"

    def _defaults(self) -> Json:
        return {"custom": {"hideFrom": {"legend": False, "tooltip": False, "viz": False}}, "unit": "short"}

    def _options(self) -> Json:
        return {
            "calculate": False,
            "yAxis": {"axisPlacement": "left", "unit": self.unit, "reverse": False},
            "rowsFrame": {"layout": "auto"},
            "color": {
                "mode": "scheme",
                "scheme": "Oranges",
                "steps": 64,
                "exponent": 0.5,
                "fill": "dark-orange",
                "reverse": False,
            },
            "cellGap": 1,
            "filterValues": {"le": 1e-9},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
        }

    def _targets(self) -> list[Json]:
        return [query.to_json(ref_id, format="heatmap") for query, ref_id in zip(self.queries, "A", strict=True)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table(Panel):
    """One row for each label set that the queries share, one column for each query, headed by its legend.

    Attributes:
        labels: label columns and their headings, in order.
        units: unit of a column, where it is not the panel's.
    """

    kind: ClassVar[str] = "table"

    labels: Mapping[str, str]
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    width: int = 24

    def _defaults(self) -> Json:
        custom = {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False, "filterable": False}
        return Panel._defaults(self) | {"custom": custom}

    def _overrides(self) -> list[Json]:
        return [
            {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
            for name, unit in self.units.items()
        ]

    def _options(self) -> Json:
        footer = {"show": False, "reducer": ["sum"], "countRows": False, "fields": ""}
        return {"showHeader": True, "cellHeight": "sm", "footer": footer, "sortBy": []}

    def _targets(self) -> list[Json]:
        more = {"format": "table", "instant": True, "range": False}
        return [query.to_json(ref, **more) for query, ref in zip(self.queries, string.ascii_uppercase, strict=False)]

    def _transformations(self) -> list[Json]:
        columns = {
            f"Value #{ref}": query.legend for ref, query in zip(string.ascii_uppercase, self.queries, strict=False)
        }
        names = {**self.labels, **(columns if len(self.queries) > 1 else {"Value": self.queries[0].legend})}
        order = {name: index for index, name in enumerate(names)}
        organize = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": names}
        return [{"id": "merge", "options": {}}, {"id": "organize", "options": organize}]
