"""docs/configuration.md, made from the config classes: `python -m deploy.settings.reference` writes it anew."""

from __future__ import annotations

import json
import pathlib

from deploy.settings import schema

FILE = pathlib.Path(__file__).parents[2] / "docs" / "configuration.md"

_HEAD = """\
# Configuration

<!-- Made by `python -m deploy.settings.reference` from baton/config.py; do not edit. -->

Every setting of `baton serve` has a place in a YAML file. Many have a flag as well, and all have an environment
variable. Where a setting is given several times, the flag counts, else the environment, else the file, else the
default.

```yaml
# baton.yaml, for `baton serve --config baton.yaml`
model: /models/llama        # by the name of its flag, --model
prefill_workers: 2
decode:                     # or by its place: a section, and names under it
  max_batch_seqs: 64
```

- **File**: `--config FILE`, or the path in `BATON_CONFIG`. The name of a flag, with underscores, is accepted at the
  top of the file; so is the place under its section. Both at once are an error, and so is a name that is not known.
- **Environment**: `BATON_` and the name of the flag (`BATON_PREFILL_WORKERS=2`), or `BATON_` and the place with two
  underscores between its parts (`BATON_DECODE__MAX_BATCH_SEQS=64`). Lists have commas between their items; what has
  names and values is written as in YAML (`{zone: a}`). An empty variable sets nothing. A variable that begins with
  `BATON_` and is no setting is warned about; those that Kubernetes makes for a Service named baton are not.
- **Secrets** have no flag, since everybody on a host can read command lines, and `--print-config` does not show them.

`baton serve --print-config` prints the configuration that follows from all of these, with the origin of each value
that is not the default, and exits; it can be used as a file. What is wrong is said before anything is started, with
the file and line, flag or variable that it comes from. Tracing has the standard variables of OpenTelemetry: see
[tracing.md](tracing.md).
"""


def render() -> str:
    """The page."""
    parts = [_HEAD]
    top = [value for path, value in schema.values().items() if len(path) == 1]
    for section, about in schema.sections().items():
        inside = [value for path, value in schema.values().items() if path[:-1] == section]
        parts.append(f"## {'.'.join(section)}\n\n{_one_line(about)}\n\n{_table(inside)}")
    parts.append(f"## At the top\n\n{_table(top)}")
    return "\n".join(parts)


def _table(values: list[schema.Value]) -> str:
    lines = ["| Name | What it is | Type | Default | Flag | Variable |", "|---|---|---|---|---|---|"]
    for value in values:
        flag = f"`{value.flag}`" if value.flag else ""
        default = "required" if value.is_required else f"`{_shown(value.default)}`"
        cells = [
            f"`{value.path[-1]}`",
            _one_line(value.description),
            _type(value),
            default,
            flag,
            f"`{value.variables[0]}`",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(value: schema.Value) -> str:
    items = value.plain.get("items", {})
    words = {
        "array": "list",
        "object": "names and values",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
    }
    kind = words.get(value.kind, value.kind)
    if value.choices:
        kind = ", ".join(f"`{choice}`" for choice in value.choices)
    elif choices := items.get("enum"):
        kind = f"list of {', '.join(f'`{choice}`' for choice in choices)}"
    limits = value.limits()
    return f"{kind}{f', {limits}' if limits else ''}{', or null' if value.is_nullable else ''}"


def _shown(default: object) -> str:
    return default if isinstance(default, str) and default else json.dumps(default)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
