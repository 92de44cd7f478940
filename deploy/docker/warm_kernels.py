"""Compiles the CPU kernels into NUMBA_CACHE_DIR for an image: `python -m deploy.docker.warm_kernels MODEL`."""

from __future__ import annotations

import sys
from typing import Literal

from baton.config import CacheConfig, ModelConfig, WorkerConfig

CACHE_BYTES = 16 << 20


def warm(model: str, dtype: Literal["float32", "bfloat16"]) -> None:
    """Starts and stops a worker: its dry run calls every kernel."""
    from prefill_worker.actor import PrefillActor

    config = WorkerConfig(
        role="prefill",
        name="prefill-0",
        epoch=1,
        model=ModelConfig(path=model, device="cpu", dtype=dtype, attention="cpu"),
        cache=CacheConfig(kv_cache_bytes=CACHE_BYTES),
    )
    actor = PrefillActor(config.model_dump_json())
    actor.start()
    actor.stop()


if __name__ == "__main__":
    warm(sys.argv[1], "float32")
    warm(sys.argv[1], "bfloat16")
