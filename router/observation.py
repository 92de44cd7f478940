"""The moments of a request's life that metrics, timelines and traces are made of.

The pipeline tells one `Observers`, which passes each moment on to every observer, on the router's event loop; an
observer neither waits nor raises. Times are in monotonic seconds.
"""

from __future__ import annotations

from baton.errors import BatonError
from baton.v1 import inference_pb2
from router.job import Job
from router.placement import Placement
from router.recovery import Failure


class Observer:
    """What looks at requests as they pass; a subclass overrides the moments that it cares for.

    Each request that was `accepted` ends with `finished` or `failed`.
    """

    def accepted(self, job: Job) -> None:
        """Checked, tokenised, and in the queue."""

    def admitted(self, job: Job) -> None:
        """An attempt leaves the queue and asks its decode worker for blocks."""

    def placed(self, job: Job, placement: Placement) -> None:
        """An attempt's blocks are reserved and its prefill begins."""

    def reserved(self) -> None:
        """A reservation was granted."""

    def released(self) -> None:
        """A reservation was given back."""

    def sent(self, job: Job, choice: int, num_tokens: int, gap_s: float | None, now: float) -> None:
        """Tokens of a choice are on their way to the client.

        Args:
            num_tokens: at least 1, in one message.
            gap_s: the time for each since the choice's last token; None for its first, and those with it.
        """

    def retried(self, job: Job, failure: Failure) -> None:
        """An attempt ended early and another follows."""

    def finished(self, job: Job, timings: inference_pb2.StageTimings, now: float) -> None:
        """The last message is made."""

    def failed(self, job: Job | None, error: BatonError, now: float) -> None:
        """The request ends without a last message; `job` is None where it was never accepted."""


class Observers(Observer):
    """Passes each moment on to every observer, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        # Looked up once: they are called for every token.
        self._sent = [observer.sent for observer in observers if type(observer).sent is not Observer.sent]

    def accepted(self, job: Job) -> None:
        for observer in self._observers:
            observer.accepted(job)

    def admitted(self, job: Job) -> None:
        for observer in self._observers:
            observer.admitted(job)

    def placed(self, job: Job, placement: Placement) -> None:
        for observer in self._observers:
            observer.placed(job, placement)

    def reserved(self) -> None:
        for observer in self._observers:
            observer.reserved()

    def released(self) -> None:
        for observer in self._observers:
            observer.released()

    def sent(self, job: Job, choice: int, num_tokens: int, gap_s: float | None, now: float) -> None:
        for sent in self._sent:
            sent(job, choice, num_tokens, gap_s, now)

    def retried(self, job: Job, failure: Failure) -> None:
        for observer in self._observers:
            observer.retried(job, failure)

    def finished(self, job: Job, timings: inference_pb2.StageTimings, now: float) -> None:
        for observer in self._observers:
            observer.finished(job, timings, now)

    def failed(self, job: Job | None, error: BatonError, now: float) -> None:
        for observer in self._observers:
            observer.failed(job, error, now)
