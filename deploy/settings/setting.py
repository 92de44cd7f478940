"""One value that somebody has set, and where."""

from __future__ import annotations

import dataclasses
from typing import Any

from deploy.settings import schema

MAX_VALUE_CHARS = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A value with its origin.

    Attributes:
        name: what it was called there: `--http-port`, `BATON_HTTP_PORT`, `router.http_port`.
        where: the file and line; empty for flags and the environment, whose names say enough.
    """

    path: schema.Path
    value: Any
    name: str
    where: str = ""

    @property
    def origin(self) -> str:
        """Where the value is from, without the value."""
        return (
            f"{self.where} {self.name}" if self.where and self.name != ".".join(self.path) else self.where or self.name
        )

    def __str__(self) -> str:
        """Origin and value, as an error begins with them."""
        beginning = f"{self.where}: {self.name}" if self.where else self.name
        definition = schema.values().get(self.path)
        if definition is not None and definition.is_secret:
            return beginning
        shown = self.value if isinstance(self.value, str) else repr(self.value)
        if len(shown) > MAX_VALUE_CHARS:
            shown = f"{shown[:MAX_VALUE_CHARS]}…"
        return f"{beginning} {shown}" if shown else f'{beginning} ""'
