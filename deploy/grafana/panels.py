"""Builders of Grafana dashboards: queries become panels, panels are laid out in rows, rows make a dashboard.

Every function returns plain JSON values in Grafana's own dashboard schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SCHEMA_VERSION = 39  # Grafana 10.1; newer ones bring a dashboard up to date when they load it
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = dict[str, Any]


class Query(NamedTuple):
    """A PromQL expression, and how its series are called; {{label}} stands for a label's value."""

    expr: str
    legend: str


class Row(NamedTuple):
    """Panels under one heading."""

    title: str
    panels: Sequence[Json]


def graph(
    title: str, description: str, unit: str, *queries: Query, width: int = 8, stacked: bool = False
) -> Json:
    """Curves over time; `unit` is Grafana's id of it, "s", "bytes", "percentunit"…"""
    custom = {
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    options = {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    fields = {"unit": unit, "custom": custom}
    return _panel(
        "timeseries", title, description, queries=queries, width=width, fields=fields, options=options
    )


def stat(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    yellow_from: float | None = None,
    red_from: float | None = None,
    red_below: float | None = None,
) -> Json:
    """The newest value, large, in a colour that says whether it is well."""
    steps: list[Json] = [{"color": "green", "value": None}]
    if red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": red_below}]
    for colour, start in (("yellow", yellow_from), ("red", red_from)):
        if start is not None:
            steps.append({"color": colour, "value": start})
    fields = {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}}
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "auto",
    }
    return _panel(
        "stat", title, description, queries=[query], width=4, height=4, fields=fields, options=options
    )


def heatmap(title: str, description: str, query: Query, *, width: int = 8) -> Json:
    """How a histogram of seconds spreads over time; the query keeps the label `le`."""
    options = {
        "calculate": False,
        "yAxis": {"unit": "s"},
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "cellGap": 1,
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
    }
    fields = {"unit": "s"}
    panel = _panel(
        "heatmap", title, description, queries=[query], width=width, fields=fields, options=options
    )
    panel["targets"][0]["format"] = "heatmap"
    return panel


def variable(name: str, label: str, query: str) -> Json:
    """A drop-down of a label's values; all of them until somebody chooses."""
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def dashboard(uid: str, title: str, description: str, variables: Sequence[Json], rows: Iterable[Row]) -> Json:
    """A whole dashboard. Panels get their numbers and places here."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["tutelage"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,  # the crosshair is in all panels at once
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [_siblings()],
        "annotations": {"list": [_firing_alerts()]},
        "templating": {"list": [_data_source(), *variables]},
        "panels": list(_placed(rows)),
    }


def _panel(
    kind: str,
    title: str,
    description: str,
    *,
    queries: Sequence[Query],
    width: int,
    height: int = 8,
    fields: Json,
    options: Json,
) -> Json:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "range": True,
        }
        for number, query in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": targets,
        "fieldConfig": {"defaults": fields, "overrides": []},
        "options": options,
    }


def _placed(rows: Iterable[Row]) -> Iterable[Json]:
    """Rows under each other, each filled from the left; a panel that does not fit begins the next line."""
    y = number = 0
    for row in rows:
        number += 1
        yield {"type": "row", "id": number, "title": row.title, "collapsed": False, "panels": []} | {
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        }
        x, y, line = 0, y + 1, 0
        for panel in row.panels:
            number += 1
            size = panel["gridPos"]
            if x + size["w"] > COLUMNS:
                x, y, line = 0, y + line, 0
            yield {**panel, "id": number, "gridPos": {**size, "x": x, "y": y}}
            x, line = x + size["w"], max(line, size["h"])
        y += line


def _data_source() -> Json:
    """Whichever Prometheus the Grafana at hand has."""
    return {
        "type": "datasource",
        "name": "datasource",
        "label": "Prometheus",
        "query": "prometheus",
        "refresh": 1,
    }


def _firing_alerts() -> Json:
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Tutelage.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{teacher}} {{run}} {{instance}}",
        "step": "30s",
    }


def _siblings() -> Json:
    return {
        "type": "dashboards",
        "title": "Tutelage",
        "tags": ["tutelage"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "icon": "external link",
    }
