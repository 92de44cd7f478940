"""Which workers serve a request: pure functions of a snapshot, a demand, and what was placed but is not visible yet.

Costs are in prompt tokens, in the manner of NVIDIA Dynamo's router: what must be computed (beyond the cached prefix,
behind what is queued already), plus what must be sent, plus the load of the decode worker. The lowest wins.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from router.snapshot import ClusterSnapshot, WorkerKey, WorkerView


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPolicy:
    """The weights of the cost function and the rules around it.

    Attributes:
        local_prefill_tokens: a decode worker that lacks fewer tokens than this prefills them itself.
        backlog_prefill_tokens: most tokens that a decode worker prefills itself because it would be done sooner than
            the prefill workers; 0 leaves them all to these.
        local_slowdown: how many times longer a prompt token takes at a decode worker than at a prefill worker.
        watermark: share of a decode worker's pool that admission leaves free.
        local_weight: cost of a token prefilled by a decode worker, where it slows the streams of others.
        transfer_weight: cost of sending a token's KV; small, since sending hides behind the compute.
        request_weight: cost of a running request on a decode worker: its share of each step.
        resident_weight: cost of a token that a decode worker holds: attention reads it in each step.
    """

    local_prefill_tokens: int = 32
    backlog_prefill_tokens: int = 0
    # Workers report no speeds. A chunk is meant to take about half as long as the decodes of its step, and is then a
    # third of what the worker computes.
    local_slowdown: float = 3.0
    watermark: float = 0.02
    local_weight: float = 8.0
    transfer_weight: float = 0.25
    request_weight: float = 32.0
    resident_weight: float = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a request needs.

    Attributes:
        num_tokens: tokens whose KV all choices share: the prompt, and what was delivered of a single choice.
        own_tokens: for each choice the tokens after these that it must be given back.
        block_hashes: chained hash of each full block of the shared tokens.
        avoid: workers that just failed or refused it.
    """

    num_tokens: int
    own_tokens: Sequence[int] = (0,)
    block_hashes: Sequence[bytes] = ()
    avoid: frozenset[WorkerKey] = frozenset()


@dataclasses.dataclass(slots=True)
class Pending:
    """What was placed on a worker and may not show in its state yet.

    Attributes:
        blocks: reserved, or about to be, after the last state was made.
        prefill_tokens: of all this router's requests whose first token is still to come.
        requests: all this router's requests on the worker.
    """

    blocks: int = 0
    prefill_tokens: int = 0
    requests: int = 0


class Decision(enum.StrEnum):
    """Who prefills, and why."""

    REMOTE = "remote"
    LOCAL_SHORT = "local_short"
    LOCAL_CACHED = "local_cached"
    LOCAL_BACKLOG = "local_backlog"
    LOCAL_NO_PREFILL_WORKER = "local_no_prefill_worker"


class Blocked(enum.StrEnum):
    """Why a request cannot be placed now."""

    NO_DECODE_WORKER = "no decode worker"
    NO_BLOCKS = "no free blocks"
    NO_CREDIT = "no prefill credit"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request goes: `prefill` is None where the decode worker prefills itself."""

    decode: WorkerKey
    prefill: WorkerKey | None
    decision: Decision
    blocks: int
    prefill_tokens: int
    cost: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Remote:
    """What the prefill workers can do for a demand.

    Attributes:
        source: of those with credit the one that would be done first, and after how many tokens of compute.
        wait_tokens: tokens of compute until the first of them would be done, whether it has credit or not; 0 where the
            demand avoids them all.
        is_usable: whether one may be used at all, by this demand or another.
    """

    source: tuple[float, WorkerView] | None
    wait_tokens: int
    is_usable: bool


_NOTHING = Pending()
_Load = Mapping[WorkerKey, Pending]


def place(snapshot: ClusterSnapshot, pending: _Load, demand: Demand, policy: PlacementPolicy) -> Placement | Blocked:
    """The cheapest placement, or what stands in the way. Ties go to the first name."""
    if not snapshot.has_decode_worker:
        return Blocked.NO_DECODE_WORKER
    roomy = [
        view for view in snapshot.decode if _is_candidate(view, demand) and has_room(view, pending, demand, policy)
    ]
    if not roomy:
        return Blocked.NO_BLOCKS
    remote = _remote(snapshot, pending, demand)
    options = [option for view in roomy if (option := _option(view, remote, pending, demand, policy)) is not None]
    if not options:
        return Blocked.NO_CREDIT
    return min(options, key=lambda option: (option.cost, option.decode))


def num_lacking(view: WorkerView, demand: Demand) -> int:
    """Tokens of the demand that the worker has not cached; the last token is always computed, for its logits."""
    cached = view.cached.num_leading(demand.block_hashes) * view.block_size
    return demand.num_tokens - min(cached, (demand.num_tokens - 1) // view.block_size * view.block_size)


def num_blocks_needed(view: WorkerView, demand: Demand) -> int:
    """Blocks that a reservation takes: the shared full ones and a tail for each choice, less the cached ones.

    In every group; an upper bound where some have a sliding window.
    """
    num_shared, rest = divmod(demand.num_tokens, view.block_size)
    num_cached = (demand.num_tokens - num_lacking(view, demand)) // view.block_size
    num_own = sum((rest + num_tokens) // view.block_size + 1 for num_tokens in demand.own_tokens)
    return view.num_groups * (num_shared - num_cached + num_own)


def has_room(view: WorkerView, pending: _Load, demand: Demand, policy: PlacementPolicy) -> bool:
    """Whether the worker stays above its watermark; one that is idle takes whatever fits it alone."""
    load = pending.get(view.key, _NOTHING)
    if _num_requests(view, load) == 0:
        return True
    left = view.free_blocks - load.blocks - num_blocks_needed(view, demand)
    return left >= policy.watermark * view.total_blocks


def has_credit(view: WorkerView, pending: _Load, demand: Demand) -> bool:
    """Whether a prefill worker takes the demand on top of its queue; one that is idle takes any."""
    queued = _num_queued(view, pending)
    return queued == 0 or queued + num_lacking(view, demand) <= view.token_credit


def _is_candidate(view: WorkerView, demand: Demand) -> bool:
    return view.usable and view.key not in demand.avoid


def _remote(snapshot: ClusterSnapshot, pending: _Load, demand: Demand) -> _Remote:
    """Looks at every prefill worker."""
    waits = [
        (num_lacking(view, demand) + _num_queued(view, pending), view)
        for view in snapshot.prefill
        if _is_candidate(view, demand)
    ]
    return _Remote(
        source=min(
            (entry for entry in waits if has_credit(entry[1], pending, demand)),
            key=lambda entry: (entry[0], entry[1].key),
            default=None,
        ),
        wait_tokens=min((wait for wait, _ in waits), default=0),
        is_usable=any(view.usable for view in snapshot.prefill),
    )


def _option(
    view: WorkerView, remote: _Remote, pending: _Load, demand: Demand, policy: PlacementPolicy
) -> Placement | None:
    """The best way to use one decode worker; None if it needs a prefill worker and none has credit."""
    lacking = num_lacking(view, demand)
    load = pending.get(view.key, _NOTHING)
    base_cost = _decode_load(view, load, policy)
    local_wait = policy.local_slowdown * (_num_queued(view, pending) + lacking)
    decision = _decide(lacking, local_wait, remote, demand, policy)
    if decision is Decision.REMOTE:
        if remote.source is None:
            return None
        remote_wait, source = remote.source
        cost, prefill, to_prefill = remote_wait + policy.transfer_weight * lacking, source.key, source
    elif decision is Decision.LOCAL_BACKLOG:
        cost, prefill, to_prefill = local_wait, None, view
    else:
        # What is short enough to be always prefilled in place is too short to slow anybody.
        weight = 1.0 if decision is Decision.LOCAL_SHORT else policy.local_weight
        cost, prefill, to_prefill = weight * lacking, None, view
    return Placement(
        decode=view.key,
        prefill=prefill,
        decision=decision,
        blocks=num_blocks_needed(view, demand),
        prefill_tokens=num_lacking(to_prefill, demand),
        cost=base_cost + cost,
    )


def _decide(lacking: int, local_wait: float, remote: _Remote, demand: Demand, policy: PlacementPolicy) -> Decision:
    """Local where little is lacking, where no prefill worker is there or that one would compute far more, and where a
    prompt of bounded length would be done sooner than behind what the prefill workers have to do first.

    Queues count for no longer prompt: waiting for a prefill worker is better than slowing a decode worker's streams
    for as long as that would take.

    Args:
        local_wait: until the decode worker would have computed it, in tokens of a prefill worker's compute, as are all
            costs here. Both waits have the queue in them, so a burst is shared out such that both sides end together.
    """
    if lacking < policy.local_prefill_tokens:
        return Decision.LOCAL_SHORT
    if not remote.is_usable:
        return Decision.LOCAL_NO_PREFILL_WORKER
    transfer = policy.transfer_weight * lacking
    if remote.source is not None and policy.local_weight * lacking < num_lacking(remote.source[1], demand) + transfer:
        return Decision.LOCAL_CACHED
    if lacking <= policy.backlog_prefill_tokens and local_wait < remote.wait_tokens + transfer:
        return Decision.LOCAL_BACKLOG
    return Decision.REMOTE


def _decode_load(view: WorkerView, load: Pending, policy: PlacementPolicy) -> float:
    blocks = max(view.total_blocks - view.free_blocks, 0) + load.blocks
    resident = blocks * view.block_size / view.num_groups
    return policy.request_weight * _num_requests(view, load) + policy.resident_weight * resident


def _num_requests(view: WorkerView, load: Pending) -> int:
    """Requests on a worker. Its state lags behind what this router placed, and knows of what other routers did."""
    return max(view.running + view.waiting, load.requests)


def _num_queued(view: WorkerView, pending: _Load) -> int:
    return max(view.queued_tokens, pending.get(view.key, _NOTHING).prefill_tokens)
