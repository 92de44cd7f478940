"""What the router has placed on each worker and cannot see in the worker's state yet.

Without it a burst of requests would all go to the worker that looked best in one and the same state.
Called by the admission queue and the pipeline, on the router's event loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from router.placement import Pending, Placement
from router.snapshot import WorkerKey


@dataclasses.dataclass(slots=True, eq=False)
class Charge:
    """What one attempt still counts for; changed by the ledger alone."""

    placement: Placement
    blocks: int
    prefill_tokens: int
    requests: int = 1


class Ledger:
    """All open charges, summed up for each worker. Every method may be called again for the same charge."""

    def __init__(self) -> None:
        self._pending: dict[WorkerKey, Pending] = {}
        self._awaiting_state: dict[WorkerKey, set[Charge]] = {}

    @property
    def pending(self) -> Mapping[WorkerKey, Pending]:
        return self._pending

    def charge(self, placement: Placement) -> Charge:
        """Counts a placement from now on."""
        charge = Charge(placement, placement.blocks, placement.prefill_tokens)
        decode = self._entry(placement.decode)
        decode.blocks += charge.blocks
        decode.requests += 1
        self._entry(placement.prefill or placement.decode).prefill_tokens += charge.prefill_tokens
        return charge

    def reserved(self, charge: Charge) -> None:
        """The decode worker has answered: the next state that it sends shows the blocks."""
        if charge.blocks:
            self._awaiting_state.setdefault(charge.placement.decode, set()).add(charge)

    def state_arrived(self, key: WorkerKey) -> None:
        """A worker has sent its state: what it had answered before is part of it."""
        for charge in self._awaiting_state.pop(key, ()):
            self._entry(key).blocks -= charge.blocks
            charge.blocks = 0

    def prefilled(self, charge: Charge) -> None:
        """The prompt is computed."""
        key = charge.placement.prefill or charge.placement.decode
        if charge.prefill_tokens:
            self._entry(key).prefill_tokens -= charge.prefill_tokens
            charge.prefill_tokens = 0
            self._drop_if_empty(key)

    def release(self, charge: Charge) -> None:
        """The attempt is over."""
        self.prefilled(charge)
        key = charge.placement.decode
        entry = self._entry(key)
        entry.blocks -= charge.blocks
        entry.requests -= charge.requests
        charge.blocks = charge.requests = 0
        if awaiting := self._awaiting_state.get(key):
            awaiting.discard(charge)
        self._drop_if_empty(key)

    def _entry(self, key: WorkerKey) -> Pending:
        return self._pending.setdefault(key, Pending())

    def _drop_if_empty(self, key: WorkerKey) -> None:
        if self._pending.get(key) == Pending():
            del self._pending[key]
