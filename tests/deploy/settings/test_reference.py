"""The pages that are made from the code are those that it makes now."""

from __future__ import annotations

from deploy.cli import reference as cli_reference
from deploy.settings import reference, schema


def test_the_configuration_reference_is_current() -> None:
    assert reference.FILE.read_text() == reference.render(), "run python -m deploy.settings.reference"


def test_the_command_line_reference_is_current() -> None:
    assert cli_reference.FILE.read_text() == cli_reference.render(), "run python -m deploy.cli.reference"


def test_every_setting_is_in_the_reference() -> None:
    page = reference.render()
    for value in schema.values().values():
        assert f"| `{value.path[-1]}` |" in page
        assert value.variables[0] in page
