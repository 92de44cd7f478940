"""The stages of a request's life, named once for traces, metrics and logs alike.

QUEUED -> RESERVED -> PREFILL -> TRANSFER -> DECODE -> FINISHED
              (PREEMPTED returns to QUEUED; CANCELLED and FAILED end any stage)
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class StageTimings:
    """Seconds spent in each stage of a request's last attempt; `transfer_s` is the exposed part only."""

    queue_s: float = 0.0
    reserve_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_decode_step_s: float = 0.0
    decode_s: float = 0.0
    local_prefill: bool = False
    attempts: int = 1
    prefill_worker: str = ""
    decode_worker: str = ""
