"""A prefill worker as one object to start and stop, for a Ray actor or a plain process to host."""

from __future__ import annotations

from baton.config import WorkerConfig
from baton.internal.v1 import worker_pb2_grpc
from kvtransfer.leading_sender import LeadingSender
from kvtransfer.pages import pool_memory
from kvtransfer.sender import Sender
from prefill_worker.loop import PrefillLoop
from prefill_worker.service import PrefillService
from worker.core import WorkerCore
from worker.ranks.processes import Launched
from worker.ranks.transfers import RemoteSender, rank_heads, tell_sender


class PrefillActor:
    """All methods are called by the hosting thread."""

    def __init__(self, config_json: str) -> None:
        """Begins the processes of the worker's other ranks, on a thread that must last, and not be beside another if
        they are to be forked."""
        self._config = WorkerConfig.model_validate_json(config_json)
        self._launched = Launched(self._config.tensor_parallel_size - 1)
        self._core: WorkerCore | None = None
        self._sender: LeadingSender | None = None
        self._loop: PrefillLoop | None = None

    def start(self) -> bytes:
        """Load the model and serve; returns a serialised WorkerInfo.

        Raises:
            ValueError: the checkpoint or the pool will not do.
        """
        config = self._config
        core = WorkerCore(config, self._launched, chunk_tokens=config.prefill.max_batch_tokens)
        sender = LeadingSender(
            Sender(
                pool_memory(core.engine.cache.kv, rank_heads(core.engine.layout.num_kv_heads, 0)),
                core.engine.layout,
                core.fingerprint,
                config.name,
                config.epoch,
                config.transfer,
                core.transfer_metrics,
            )
        )
        loop = PrefillLoop(
            core.engine,
            sender,
            config=config.prefill,
            leases=core.leases,
            tombstones=core.tombstones,
            watch=core.watch,
            metrics=core.metrics,
            post=core.thread.post,
            clock=core.clock,
            tell_ranks=core.team.send,
        )
        service = PrefillService(
            loop,
            core.thread,
            grammars=core.engine.grammars,
            leases=core.leases,
            watch=core.watch,
            tracer=core.tracer,
        )
        self._core, self._sender, self._loop = core, sender, loop
        core.team.start(tell_sender(sender))
        sender.lead([RemoteSender(steps) for steps in core.team.steps])
        core.serve(loop, lambda server: worker_pb2_grpc.add_PrefillWorkerServicer_to_server(service, server))
        return core.info().SerializeToString()

    def drain(self, timeout_s: float) -> None:
        """Finish what was accepted, for at most `timeout_s` seconds; routers are told to send nothing more."""
        if self._core is not None and self._loop is not None:
            self._core.thread.post(self._loop.drain)
            self._core.drain(timeout_s)

    def stop(self) -> None:
        """Give up everything. Idempotent."""
        if self._core is not None and self._sender is not None:
            self._core.host.stop()
            self._sender.close()
            self._core.stop()
            self._core = None
