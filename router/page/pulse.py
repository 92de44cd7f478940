"""How fast the router's requests go just now: tokens and bytes a second, and latencies of the last requests.

An `Observer` on the router's event loop. Adding to it costs next to nothing; rates and percentiles are computed when
somebody asks. Memory is bounded whatever the load: at high rates the percentiles are of a shorter time.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping

from router.job import Job
from router.observation import Observer
from router.placement import Placement
from router.request_state import Progress
from router.snapshot import WorkerKey

_WINDOW_S = 5.0
_BUCKET_S = 0.5
# A rate is never taken over less than this, so that the first token of an idle cluster is no peak.
_MIN_SPAN_S = 1.0
_NUM_LATENCIES = 512
_NUM_PREFILLS = 512
_NUM_WORKERS = 64


class Rate:
    """Something counted over the last seconds, in a ring of buckets."""

    def __init__(self) -> None:
        # [index, amount], the index in units of `_BUCKET_S`.
        self._buckets: collections.deque[list[float]] = collections.deque(maxlen=int(_WINDOW_S / _BUCKET_S) + 1)
        self._last_index: int | None = None

    def add(self, now: float, amount: float) -> None:
        index = int(now / _BUCKET_S)
        if index == self._last_index:
            self._buckets[-1][1] += amount
        else:
            self._last_index = index
            self._buckets.append([index, amount])

    def per_second(self, now: float) -> float:
        return rate_of(((index * _BUCKET_S, amount) for index, amount in self._buckets), now)


def rate_of(events: Iterable[tuple[float, float]], now: float) -> float:
    """Amounts a second, from (when, how much): over the window, or over the time since the first event in it."""
    recent = [(at, amount) for at, amount in events if at > now - _WINDOW_S]
    if not recent:
        return 0.0
    span = max(now - min(at for at, _ in recent), _MIN_SPAN_S)
    return sum(amount for _, amount in recent) / span


@dataclasses.dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the last latencies, in seconds."""

    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles | None:
        """By nearest rank; None where there are none."""
        ranked = sorted(values)
        if not ranked:
            return None
        last = len(ranked) - 1
        return cls(ranked[round(0.5 * last)], ranked[round(0.99 * last)])


@dataclasses.dataclass(slots=True)
class PrefixTally:
    """Prompt tokens that one worker incarnation was given to prefill, and those that it had cached."""

    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclasses.dataclass(slots=True)
class _Prefill:
    """One prompt on its way through prefill and transfer; its progress is read when somebody asks."""

    prompt_tokens: int
    worker: WorkerKey
    progress: Progress
    is_local: bool

    @property
    def computed(self) -> tuple[float, float] | None:
        """(when, how many tokens); None where it is not known yet."""
        at = self.progress.decoding_at if self.is_local else self.progress.first_tokens_at
        if at is None or self.progress.cached_tokens is None:
            return None
        return at, max(self.prompt_tokens - self.progress.cached_tokens, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """The last transfer that carried anything."""

    num_bytes: int
    bytes_per_second: float
    transport: str


class Pulse(Observer):
    """Rates and latencies of one router.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._generated = Rate()
        self._ttft_s: collections.deque[float] = collections.deque(maxlen=_NUM_LATENCIES)
        self._itl_s: collections.deque[float] = collections.deque(maxlen=_NUM_LATENCIES)
        self._prefills: collections.deque[_Prefill] = collections.deque(maxlen=_NUM_PREFILLS)
        self._tallies: collections.OrderedDict[WorkerKey, PrefixTally] = collections.OrderedDict()

    def placed(self, job: Job, placement: Placement) -> None:
        assert job.attempt is not None
        worker = placement.prefill or placement.decode
        is_local = placement.prefill is None
        self._prefills.append(_Prefill(len(job.prompt.token_ids), worker, job.attempt.progress, is_local))

    def sent(self, job: Job, choice: int, num_tokens: int, gap_s: float | None, now: float) -> None:
        self._generated.add(now, num_tokens)
        if gap_s is not None:
            for _ in range(num_tokens):
                self._itl_s.append(gap_s)
        elif len(job.first_token_at) == 1:
            self._ttft_s.append(now - job.arrived_at)
            self._note_prefix(job)

    @property
    def ttft(self) -> Percentiles | None:
        return Percentiles.of(self._ttft_s)

    @property
    def inter_token(self) -> Percentiles | None:
        return Percentiles.of(self._itl_s)

    @property
    def exposed_transfer(self) -> Percentiles | None:
        """Of transfers that have ended."""
        sent = [prefill.progress for prefill in self._prefills if prefill.progress.sent_at is not None]
        return Percentiles.of(progress.exposed_transfer_s() for progress in sent)

    @property
    def generated_per_second(self) -> float:
        return self._generated.per_second(self._clock())

    @property
    def prefilled_per_second(self) -> float:
        """Prompt tokens that workers computed; counted when a prompt is done."""
        return rate_of((done for prefill in self._prefills if (done := prefill.computed)), self._clock())

    @property
    def transferred_per_second(self) -> float:
        """Bytes of KV; counted when a transfer is committed."""
        sent = [(progress.sent_at, progress.sent_bytes) for progress in self._progresses()]
        return rate_of([(at, num_bytes) for at, num_bytes in sent if at is not None], self._clock())

    @property
    def last_transfer(self) -> Transfer | None:
        sent = [progress for progress in self._progresses() if progress.sent_bytes and progress.sending_s]
        if not sent:
            return None
        last = max(sent, key=lambda progress: progress.sent_at or 0.0)
        return Transfer(last.sent_bytes, last.sent_bytes / last.sending_s, last.transport)

    @property
    def local_share(self) -> float | None:
        """Of the last prompts, how many the decode worker prefilled itself."""
        if not self._prefills:
            return None
        return sum(prefill.is_local for prefill in self._prefills) / len(self._prefills)

    @property
    def prefix_tallies(self) -> Mapping[WorkerKey, PrefixTally]:
        return self._tallies

    def _progresses(self) -> Iterable[Progress]:
        return (prefill.progress for prefill in self._prefills)

    def _note_prefix(self, job: Job) -> None:
        """A prompt's first token is here, so what its prefill found cached is known."""
        attempt = job.attempt
        if attempt is None or attempt.progress.cached_tokens is None:
            return
        key = attempt.placement.prefill or attempt.placement.decode
        tally = self._tallies.setdefault(key, PrefixTally())
        tally.prompt_tokens += len(job.prompt.token_ids)
        tally.cached_tokens += attempt.progress.cached_tokens
        if len(self._tallies) > _NUM_WORKERS:
            self._tallies.popitem(last=False)
