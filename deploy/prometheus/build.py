"""`python -m deploy.prometheus.build`: writes the rules for the Prometheus operator, deploy/kuberay/rules.yaml."""

from __future__ import annotations

import pathlib
import textwrap

RULES = pathlib.Path(__file__).parent / "rules"
FILE = pathlib.Path(__file__).parents[1] / "kuberay" / "rules.yaml"

_HEAD = """\
# Made by `python -m deploy.prometheus.build` from deploy/prometheus/rules; do not edit. The Prometheus operator loads
# what the `ruleSelector` of its Prometheus matches.
"""
_OBJECT = """\
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: baton-{name}
  labels:
    app.kubernetes.io/name: baton
spec:
"""


def render() -> str:
    """The text of the file: a PrometheusRule for each file of rules, whose text is kept."""
    return _HEAD + "---\n".join(_object(path) for path in sorted(RULES.glob("*.yml")))


def _object(path: pathlib.Path) -> str:
    _, key, groups = path.read_text().partition("groups:\n")
    return _OBJECT.format(name=path.stem) + textwrap.indent(key + groups, "  ")


def main() -> None:
    FILE.write_text(render())


if __name__ == "__main__":
    main()
