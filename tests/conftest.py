"""What holds for every test: one compute thread, since tests share their cores with the clusters that they start, no
handlers of gRPC's around forks, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer

    from tests.cluster.harness import ClusterUnderTest
    from tests.scheduling import ClustersInOneProcess

# Before torch and numba are imported anywhere: both read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before gRPC is: with its handlers a child now and then dies between fork and exec where other threads are calling, as
# they are when a test starts Ray in this process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Before Triton is, which transformers does: it decides then, for its own library as well.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def demo_cluster() -> Iterator[ClusterUnderTest]:
    """One prefill and one decode worker on the demo model, for all tests that only use a cluster as clients do."""
    from deploy.tour import MODEL
    from tests.cluster.harness import running_cluster

    with running_cluster(MODEL, "--served-model-name", "demo") as cluster:
        yield cluster


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ClustersInOneProcess:
    from tests.scheduling import ClustersInOneProcess

    return ClustersInOneProcess(config, log)
