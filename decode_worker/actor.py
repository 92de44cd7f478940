"""A decode worker as one object to start and stop, for a Ray actor or a plain process to host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc

from baton.config import WorkerConfig
from baton.internal.v1 import transfer_pb2, transfer_pb2_grpc, worker_pb2_grpc
from baton.requests import AttemptRef
from decode_worker.loop import DecodeLoop
from decode_worker.outbox import Outbox
from decode_worker.service import DecodeService
from kvtransfer.leading_receiver import LeadingReceiver
from kvtransfer.pages import pool_memory
from kvtransfer.receiver import Receiver
from kvtransfer.service import KVTransferService
from worker.core import WorkerCore
from worker.ranks.processes import Launched
from worker.ranks.transfers import RemoteReceiver, rank_heads, tell_receiver


class PostedEvents:
    """Hands a receiver's events, which come from its own threads, to the decode loop on the engine thread."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self.loop: DecodeLoop | None = None

    def committed(self, ref: AttemptRef, first_tokens: Sequence[transfer_pb2.FirstToken]) -> None:
        self._post(lambda: self._target.commit(ref, first_tokens))

    def aborted(self, ref: AttemptRef, reason: str) -> None:
        self._post(lambda: self._target.transfer_aborted(ref, reason))

    def released(self, ref: AttemptRef) -> None:
        self._post(lambda: self._target.released(ref))

    @property
    def _target(self) -> DecodeLoop:
        assert self.loop is not None
        return self.loop


class DecodeActor:
    """All methods are called by the hosting thread."""

    def __init__(self, config_json: str) -> None:
        """Begins the processes of the worker's other ranks, on a thread that must last, and not be beside another if
        they are to be forked."""
        self._config = WorkerConfig.model_validate_json(config_json)
        self._launched = Launched(self._config.tensor_parallel_size - 1)
        self._core: WorkerCore | None = None
        self._receiver: Receiver | None = None
        self._loop: DecodeLoop | None = None

    def start(self) -> bytes:
        """Load the model and serve; returns a serialised WorkerInfo.

        Raises:
            ValueError: the checkpoint or the pool will not do.
        """
        config = self._config
        core = WorkerCore(
            config,
            self._launched,
            chunk_tokens=config.decode.prefill_chunk_tokens,
            decode_sequences=config.decode.max_batch_seqs,
        )
        events = PostedEvents(core.thread.post)
        leader = LeadingReceiver(core.fingerprint, config.name, config.epoch, config.transfer, events)
        receiver = Receiver(
            pool_memory(core.engine.cache.kv, rank_heads(core.engine.layout.num_kv_heads, 0)),
            core.engine.layout,
            core.fingerprint,
            config.name,
            config.epoch,
            config.transfer,
            core.transfer_metrics,
            leader,
        )
        outbox = Outbox()
        loop = DecodeLoop(
            core.engine,
            leader,
            outbox,
            config=config.decode,
            leases=core.leases,
            tombstones=core.tombstones,
            watch=core.watch,
            metrics=core.metrics,
            clock=core.clock,
        )
        events.loop = loop
        service = DecodeService(
            loop,
            core.thread,
            outbox,
            epoch=config.epoch,
            grammars=core.engine.grammars,
            leases=core.leases,
            watch=core.watch,
            tracer=core.tracer,
        )

        def register(server: grpc.aio.Server) -> None:
            worker_pb2_grpc.add_DecodeWorkerServicer_to_server(service, server)
            transfer_pb2_grpc.add_KVTransferServicer_to_server(KVTransferService(leader), server)

        self._core, self._receiver, self._loop = core, receiver, loop
        core.serve(loop, register)
        receiver.listen(config.host)
        shards = core.team.start(tell_receiver(leader))
        leader.lead([receiver, *map(RemoteReceiver, core.team.steps, shards)], core.host.address)
        return core.info().SerializeToString()

    def drain(self, timeout_s: float) -> None:
        """Finish what was accepted, for at most `timeout_s` seconds; nothing more is reserved."""
        if self._core is not None and self._loop is not None:
            self._core.thread.post(self._loop.drain)
            self._core.drain(timeout_s)

    def stop(self) -> None:
        """Give up everything. Idempotent."""
        if self._core is not None and self._receiver is not None:
            self._core.host.stop()
            self._receiver.close()
            self._core.stop()
            self._core = None
