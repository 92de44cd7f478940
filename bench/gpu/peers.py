"""Other libraries' attention over the same call; each is left out where it is not installed or refuses the call."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch

from bench.kernels import Call

Run = Callable[[], torch.Tensor]

_WORKSPACE_BYTES = 256 << 20
# As vLLM's own backend calls it.
_VLLM_SEGMENTS = 16


def sdpa(call: Call) -> Run | None:
    """torch's fused attention over contiguous keys and values, whose gathering is not counted.

    Chunks after a prefix have a mask that its fused kernels do not take.
    """
    shape = call.shape
    if 1 < shape.queries < shape.context:
        return None
    blocks = call.pages[call.group.block_tables.long()]
    key, value = blocks.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, : shape.context]
    query = call.query.view(shape.sequences, shape.queries, call.num_heads, -1).transpose(1, 2).contiguous()
    is_causal = shape.queries > 1

    def run() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def flashinfer(call: Call) -> Run | None:
    """FlashInfer's batch wrappers over the pages as they are; planning is not counted."""
    library = importlib.import_module("flashinfer")
    shape, pool, device = call.shape, call.layout, call.query.device
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    width = call.group.block_tables.shape[1]
    starts = torch.arange(shape.sequences + 1, dtype=torch.int32, device=device) * width
    last = torch.full((shape.sequences,), (shape.context - 1) % pool.block_size + 1, dtype=torch.int32, device=device)
    pages = (starts, call.group.block_tables.flatten(), last)
    heads = (call.num_heads, pool.num_kv_heads, pool.head_dim, pool.block_size)
    if shape.queries == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, *heads, q_data_type=call.query.dtype, kv_data_type=pool.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(call.context.cu_seqlens_q, *pages, *heads, causal=True, q_data_type=call.query.dtype)
    return lambda: wrapper.run(call.query, call.pages)


def vllm(call: Call) -> Run | None:
    """vLLM's Triton kernel over the pages as they are, split where its backend would split."""
    attend = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    pool, context = call.layout, call.context
    key, value = call.pages.transpose(2, 3).unbind(1)
    out = torch.empty_like(call.query)
    arguments = {
        "q": call.query,
        "k": key,
        "v": value,
        "out": out,
        "cu_seqlens_q": context.cu_seqlens_q,
        "max_seqlen_q": context.max_query_len,
        "seqused_k": context.seq_lens,
        "max_seqlen_k": context.max_seq_len,
        "softmax_scale": pool.head_dim**-0.5,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": call.group.block_tables,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
    }
    if "num_par_softmax_segments" in inspect.signature(attend).parameters:
        rows = (len(call.query), call.num_heads, _VLLM_SEGMENTS)
        arguments |= {
            "seq_threshold_3D": 128 // pool.num_kv_heads,
            "num_par_softmax_segments": _VLLM_SEGMENTS,
            "softmax_segm_output": torch.empty((*rows, pool.head_dim), device=out.device),
            "softmax_segm_max": torch.empty(rows, device=out.device),
            "softmax_segm_expsum": torch.empty(rows, device=out.device),
        }

    def run() -> torch.Tensor:
        attend(**arguments)
        return out

    return run


PEERS: dict[str, Callable[[Call], Run | None]] = {"torch SDPA": sdpa, "FlashInfer": flashinfer, "vLLM Triton": vllm}


_PACKAGES = {"FlashInfer": "flashinfer", "vLLM Triton": "vllm"}


def missing() -> list[str]:
    """Names of the peers whose library is not installed."""
    return [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package) is None]


def prepared(name: str, call: Call) -> Run | None:
    """A peer's run of a call; None where the library is missing, or is not made for such a call."""
    try:
        return PEERS[name](call)
    except ImportError:
        return None
