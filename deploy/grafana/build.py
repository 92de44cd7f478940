"""`python -m deploy.grafana.build [FOLDER]`: writes every dashboard as JSON, into dashboards/ beside this file."""

from __future__ import annotations

import json
import pathlib
import sys

from deploy.grafana.dashboard import Dashboard
from deploy.grafana.decode import DECODE
from deploy.grafana.overview import OVERVIEW
from deploy.grafana.prefill import PREFILL
from deploy.grafana.router import ROUTER
from deploy.grafana.transfer import TRANSFER

DASHBOARDS: tuple[Dashboard, ...] = (OVERVIEW, ROUTER, PREFILL, TRANSFER, DECODE)
FOLDER = pathlib.Path(__file__).parent / "dashboards"


def render(dashboard: Dashboard) -> str:
    """The text of a dashboard's file."""
    return json.dumps(dashboard.to_json(), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(render(dashboard))


if __name__ == "__main__":
    main()
