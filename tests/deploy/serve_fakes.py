"""`baton serve` with workers and a router that have no model: `python -m tests.deploy.serve_fakes FLAGS`."""

from __future__ import annotations

import functools
import sys
from unittest import mock

from deploy import serve
from deploy.cli import commands
from deploy.runtimes import make_host
from tests.deploy.fake_actors import ACTORS

if __name__ == "__main__":
    fakes = functools.partial(
        serve.serve, host_for=lambda config: make_host(config, ACTORS), router_module="tests.deploy.fake_router"
    )
    with mock.patch.object(serve, "serve", fakes):
        commands.main(["serve", *sys.argv[1:]])
