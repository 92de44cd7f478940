"""What a frame of the live page holds, gathered from the parts of the router that know it.

Ids, names, counts and times only: no prompt and nothing that was generated. Times in seconds; moments are relative to
the router's start, or to a request's arrival within it.
"""

from __future__ import annotations

import collections
import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import baton
from router.membership import Membership
from router.page.feed import Capture
from router.page.pulse import Percentiles, Pulse
from router.page.roster import Departure, Roster
from router.snapshot import WorkerView
from router.timeline import Leg, Record, Timeline

# Rows that a frame carries; what runs comes before what has ended.
_MAX_ROWS = 40
_MAX_ID_CHARS = 64
# Six digits after the point: a microsecond.
_DIGITS = 6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What does not change while the router runs.

    Attributes:
        chat: the model has a chat template.
    """

    model: str
    chat: bool


class NumRequests(NamedTuple):
    """Requests that wait for workers, and those that have them."""

    queued: int
    running: int


class Overview:
    """Captures frames for a `Feed`.

    Args:
        num_requests: of the pipeline, now.
        is_ready: whether a request can be served now.
        clock: monotonic seconds, the same as the pipeline's.
    """

    def __init__(
        self,
        *,
        served: Served,
        num_requests: Callable[[], NumRequests],
        membership: Membership,
        timeline: Timeline,
        pulse: Pulse,
        roster: Roster,
        is_ready: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._served = served
        self._num_requests = num_requests
        self._membership = membership
        self._timeline = timeline
        self._pulse = pulse
        self._roster = roster
        self._is_ready = is_ready
        self._clock = clock
        self._started_at = clock()
        # Tells a page that the router behind an address is another one than before.
        self._boot = uuid.uuid4().hex[:12]

    def version(self) -> object:
        """Another value whenever something happened that shows."""
        return self._timeline.version, self._membership.snapshot.version, self._is_ready()

    def capture(self) -> Capture:
        """A frame; settled where neither a rate nor a departed worker is about to fade."""
        now = self._clock()
        flow = self._flow()
        departed = self._roster.departed()
        rates = ("generated_per_s", "prefilled_per_s", "transferred_bytes_per_s")
        content = {
            "router": {
                "boot": self._boot,
                "now": self._since_start(now),
                "version": baton.__version__,
                "model": self._served.model,
                "chat": self._served.chat,
                "ready": self._is_ready(),
            },
            "flow": flow,
            "workers": [*self._workers(), *map(self._departed, departed)],
            "requests": [self._request(record, now) for record in self._rows()],
        }
        return Capture(content, settled=not departed and not any(flow[rate] for rate in rates))

    def _flow(self) -> dict[str, Any]:
        snapshot, pulse = self._membership.snapshot, self._pulse
        num_requests, last = self._num_requests(), pulse.last_transfer
        return {
            "queued": num_requests.queued,
            "running": num_requests.running,
            "stages": collections.Counter(record.stage for record in self._timeline.running),
            "ttft": _percentiles(pulse.ttft),
            "inter_token": _percentiles(pulse.inter_token),
            "exposed_transfer": _percentiles(pulse.exposed_transfer),
            "generated_per_s": round(pulse.generated_per_second, 1),
            "prefilled_per_s": round(pulse.prefilled_per_second, 1),
            "transferred_bytes_per_s": round(pulse.transferred_per_second),
            "last_transfer": last
            and {"bytes": last.num_bytes, "bytes_per_s": round(last.bytes_per_second), "transport": last.transport},
            "local_share": pulse.local_share,
            "prefill_queued_tokens": sum(view.queued_tokens for view in snapshot.prefill),
            "decode_batch": sum(view.running for view in snapshot.decode),
        }

    def _workers(self) -> list[dict[str, Any]]:
        snapshot = self._membership.snapshot
        return [
            {**self._worker(view), "joined_at": self._since_start(self._roster.joined_at(view.key))}
            for view in sorted(
                (*snapshot.prefill, *snapshot.decode), key=lambda view: (view.role != "prefill", view.key)
            )
        ]

    def _departed(self, departure: Departure) -> dict[str, Any]:
        view = departure.view
        return {
            "role": view.role,
            "name": view.key.name,
            "epoch": view.key.epoch,
            "state": "gone",
            "left_at": self._since_start(departure.at),
        }

    def _worker(self, view: WorkerView) -> dict[str, Any]:
        tally = self._pulse.prefix_tallies.get(view.key)
        used = max(view.total_blocks - view.free_blocks, 0) if view.connected else 0
        return {
            "role": view.role,
            "name": view.key.name,
            "epoch": view.key.epoch,
            "state": "unreachable" if not view.connected else "draining" if view.draining else "up",
            "running": view.running,
            "waiting": view.waiting,
            "queued_tokens": view.queued_tokens,
            "block_tokens": view.block_size,
            "blocks": {"total": view.total_blocks, "used": used, "cached": _cached_free(view, used)},
            "prefix_hit_share": tally and round(tally.cached_tokens / max(tally.prompt_tokens, 1), 4),
        }

    def _rows(self) -> Sequence[Record]:
        """Newest first; the oldest of those that run are left out first."""
        running = self._timeline.running[::-1][:_MAX_ROWS]
        rows = [*running, *self._timeline.ended[::-1][: _MAX_ROWS - len(running)]]
        return sorted(rows, key=lambda record: record.arrived_at, reverse=True)

    def _request(self, record: Record, now: float) -> dict[str, Any]:
        def since_arrival(moment: float | None) -> float | None:
            return None if moment is None else round(moment - record.arrived_at, _DIGITS)

        return {
            "key": record.key,
            "id": record.request_id[:_MAX_ID_CHARS],
            "arrived_at": self._since_start(record.arrived_at),
            "outcome": record.outcome,
            "error": record.error,
            "ended": since_arrival(record.ended_at),
            "first_token": since_arrival(record.first_token_at),
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "generated_tokens": record.generated_tokens,
            "choices": record.num_choices,
            "attempts": record.num_legs,
            "legs": [
                {
                    **_workers_of(leg),
                    "failure": leg.failure,
                    "spans": [
                        [span.stage, since_arrival(span.start_s), round(span.end_s - span.start_s, _DIGITS)]
                        for span in leg.spans(now)
                    ],
                }
                for leg in record.legs
            ],
        }

    def _since_start(self, moment: float | None) -> float | None:
        return None if moment is None else round(moment - self._started_at, _DIGITS)


def _workers_of(leg: Leg) -> dict[str, str | None]:
    if leg.placement is None:
        return {"prefill": None, "decode": None}
    decode, prefill = leg.placement.decode, leg.placement.prefill
    return {"prefill": (prefill or decode).name, "decode": decode.name}


def _cached_free(view: WorkerView, used: int) -> int:
    """Free blocks that hold a prefix which may be hit, as far as is known here: what is used is taken for cached."""
    if not view.connected:
        return 0
    return min(max(view.cached.num_blocks * view.num_groups - used, 0), view.free_blocks)


def _percentiles(values: Percentiles | None) -> dict[str, float] | None:
    if values is None:
        return None
    return {"p50_s": round(values.p50_s, _DIGITS), "p99_s": round(values.p99_s, _DIGITS)}
