"""Pools on a real GPU, for tests that are skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtransfer.device_pages import DevicePages
from kvtransfer.pages import HeadRange, pool_memory

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gpu_memory(pages: np.ndarray, heads: HeadRange) -> DevicePages:
    """A pool with the content of uint8 [num_slots, num_blocks, page_bytes]."""
    pool = torch.from_numpy(pages).view(*pages.shape[:2], 2, heads.count, 1, -1).cuda()
    memory = pool_memory(pool, heads)
    assert isinstance(memory, DevicePages)
    return memory
