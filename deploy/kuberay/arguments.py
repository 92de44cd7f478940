"""What the application of Ray Serve is configured with: the `args` of a RayService."""

from __future__ import annotations

import pydantic


class Arguments(pydantic.BaseModel):
    """Checked when the application is deployed.

    Attributes:
        arguments: of `baton serve`.
        drain_s: most seconds that it may take to end; more than its `--drain-s`.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    arguments: list[str]
    drain_s: float = 75.0
