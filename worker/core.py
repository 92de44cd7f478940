"""What a worker of either role is made of: engine, thread, leases, metrics and host. The role's actor adds its loop."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from prometheus_client import CollectorRegistry

import baton
from baton.config import WorkerConfig, model_name
from baton.internal.v1 import worker_pb2
from baton.metrics import ProcessMetrics, SchedulerMetrics, TransferMetrics, describe_cache
from baton.tracing import open_tracer
from kvtransfer.lease import LeaseTable
from kvtransfer.ticket import layout_fingerprint
from worker.attempts import Tombstones
from worker.engine_thread import EngineThread, SteppedLoop
from worker.host import WorkerHost
from worker.ranks.processes import Launched
from worker.ranks.team import RankTeam
from worker.watch import WatchPublisher

logger = logging.getLogger(__name__)


class WorkerCore:
    """Made, served, drained and stopped by one thread: that of the actor.

    Attributes:
        team: the other ranks.
    """

    def __init__(
        self, config: WorkerConfig, launched: Launched, *, chunk_tokens: int, decode_sequences: int = 0
    ) -> None:
        """Loads the model and allocates the pool.

        Args:
            launched: the other ranks' processes, which end with this worker.
            chunk_tokens: most tokens of one sequence that the role computes in a step.
            decode_sequences: most sequences that it takes one token further beside these.

        Raises:
            ValueError: the checkpoint or the pool will not do.
        """
        self.config = config
        self.clock = time.monotonic
        # On a thread that ends: OpenMP counts the helpers of every thread that ever computed in parallel, and with more
        # of them than CPUs lets those of the engine's thread sleep between any two operations.
        self.team = RankTeam(config, launched)
        try:
            with ThreadPoolExecutor(1) as loader:
                self.engine = loader.submit(
                    self.team.load, chunk_tokens=chunk_tokens, decode_sequences=decode_sequences
                ).result()
        except BaseException:
            self.team.close()
            raise
        self.fingerprint = layout_fingerprint(
            self.engine.layout,
            model=model_name(config.model),
            revision=self.engine.revision,
            degree=config.tensor_parallel_size,
        )
        registry = CollectorRegistry()
        ProcessMetrics(registry)
        self.metrics = SchedulerMetrics(registry)
        self.transfer_metrics = TransferMetrics(registry)
        describe_cache(
            registry,
            block_size=self.engine.layout.block_size,
            num_blocks=self.engine.cache.pool.num_usable,
            dtype=self.fingerprint.dtype,
            prefix_cache=config.cache.enable_prefix_cache,
            num_groups=len(self.engine.layout.groups),
        )
        self.tracer = open_tracer(config.role, f"{config.name}/{config.epoch}", version=baton.__version__)
        self.thread = EngineThread(f"{config.name}-engine", rest=self.engine.cores.rest)
        self.leases = LeaseTable(config.transfer.lease_s, self.clock)
        self.tombstones = Tombstones(config.transfer.lease_s, self.clock)
        self.watch = WatchPublisher()
        self.host = WorkerHost(config.host, max_message_bytes=config.max_message_bytes, registry=registry)

    def serve(self, loop: SteppedLoop, register: Callable[[grpc.aio.Server], None]) -> None:
        """Start the engine thread on the role's loop and listen for its services."""
        self.thread.start(loop)
        self.host.start(register)
        logger.info("%s (epoch %d) listens on %s", self.config.name, self.config.epoch, self.host.address)

    def drain(self, timeout_s: float) -> None:
        """Wait until no request holds anything, or the time is over."""
        try:
            self.thread.when_idle().result(timeout_s)
        except TimeoutError:
            logger.warning("%s: requests were still running after %.0f s", self.config.name, timeout_s)

    def stop(self) -> None:
        """Close the ports, then end the engine thread. Idempotent."""
        self.host.stop()
        self.thread.stop()
        self.engine.grammars.close()
        self.engine.cores.close()
        self.team.close()
        if self.tracer is not None:
            self.tracer.close()

    def info(self) -> worker_pb2.WorkerInfo:
        """What the supervisor publishes of this worker."""
        engine = self.engine
        return worker_pb2.WorkerInfo(
            role=self.config.role,
            name=self.config.name,
            epoch=self.config.epoch,
            address=self.host.address,
            metrics_address=self.host.metrics_address,
            pid=os.getpid(),
            node=socket.gethostname(),
            architecture=type(engine.model.module).__name__,
            dtype=self.fingerprint.dtype,
            vocab_size=engine.model.vocab_size,
            max_model_len=engine.max_model_len,
            block_size=engine.layout.block_size,
            total_blocks=engine.cache.pool.num_usable,
            layout=self.fingerprint,
            max_sequence_tokens=engine.max_sequence_tokens,
            rank_metrics_addresses=self.team.metrics_addresses,
        )
