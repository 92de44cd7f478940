"""Jobs and attempts without workers, for tests of what observes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.requests import FinishReason, SamplingParams
from baton.v1 import inference_pb2
from router.admission import Entry
from router.detokenization import WindowDetokenizer
from router.emission import Emission
from router.job import Job, Prompt
from router.ledger import Ledger
from router.observation import Observer
from router.placement import Decision, Placement
from router.request_state import Attempt
from router.snapshot import WorkerKey

PREFILL, DECODE = WorkerKey("prefill-0", 1), WorkerKey("decode-0", 2)
SECRET = 777_777_777


class Clock:
    """Monotonic seconds that pass when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def job_of(*, num_tokens: int = 40, arrived_at: float = 1000.0, request_id: str = "r") -> Job:
    """A job whose prompt and texts can be told from everything else."""
    sampling = SamplingParams(max_tokens=100, n=1)
    prompt = Prompt(
        token_ids=(SECRET,) * num_tokens,
        sampling=sampling,
        stops=(),
        block_hashes=(),
        salt_root=b"",
        block_size=16,
        priority=0,
    )
    return Job(
        request_id=request_id,
        prompt=prompt,
        emission=Emission(sampling, (), functools.partial(WindowDetokenizer, lambda ids: f"secret {len(ids)}")),
        entry=Entry(0, 0, prompt.demand()),
        arrived_at=arrived_at,
        deadline=None,
    )


def begin_attempt(job: Job, observers: Sequence[Observer], *, local: bool = False) -> Attempt:
    """Leaves the queue, and is placed at once."""
    placement = Placement(
        decode=DECODE,
        prefill=None if local else PREFILL,
        decision=Decision.LOCAL_SHORT if local else Decision.REMOTE,
        blocks=1,
        prefill_tokens=1,
        cost=0.0,
    )
    ref = transfer_pb2.AttemptRef(request_id=job.internal_id, attempt=job.attempt_number)
    job.attempt = Attempt(ref, Ledger().charge(placement), [job.emission.num_tokens])
    for observer in observers:
        observer.admitted(job)
        observer.placed(job, placement)
    return job.attempt


def send_token(
    job: Job, observers: Sequence[Observer], now: float, finish_reason: FinishReason = FinishReason.NONE
) -> None:
    """One more token for the client."""
    wire_reason = inference_pb2.FinishReason.ValueType(int(finish_reason))
    token = worker_pb2.TokenOut(token_id=SECRET, position=job.emission.num_tokens, finish_reason=wire_reason)
    job.emission.take([token])
    gap_s = job.note_sent(0, 1, now)
    for observer in observers:
        observer.sent(job, 0, 1, gap_s, now)
