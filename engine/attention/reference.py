"""Attention in plain torch, one sequence at a time: the oracle of the other backends, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.attention.base import AttentionContext, GroupMetadata
from engine.dry_run import LayerAttention
from engine.kv.layout import KVLayout


class ReferenceAttention:
    """`AttentionBackend` that gathers each sequence's keys and values and masks a dense softmax."""

    def prepare(self, layout: KVLayout, layers: Sequence[LayerAttention]) -> None:
        """Nothing needs preparing."""

    def write(self, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, group: GroupMetadata) -> None:
        block_size = pages.shape[3]
        is_kept = group.slot_mapping >= 0
        slots = group.slot_mapping[is_kept]
        blocks, offsets = slots // block_size, slots % block_size
        pages[blocks, 0, :, offsets] = key[is_kept].to(pages.dtype)
        pages[blocks, 1, :, offsets] = value[is_kept].to(pages.dtype)

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        group: GroupMetadata,
        context: AttentionContext,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        starts = context.cu_seqlens_q.tolist()
        for index, length in enumerate(context.seq_lens.tolist()):
            tokens = slice(starts[index], starts[index + 1])
            num_queries = tokens.stop - tokens.start
            key, value = _gather(pages, group.block_tables[index], length)
            visible = _visible(num_queries, length, window, query.device)
            out[tokens] = _attend_dense(
                query[tokens].float(), key, value, visible, scale=scale, softcap=softcap, sinks=sinks
            ).to(out.dtype)
        return out


def _gather(pages: torch.Tensor, table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [0, length) as float32 [Hkv, length, D]; what was never written may be NaN."""
    _, _, num_kv_heads, block_size, head_dim = pages.shape
    blocks = pages[table[: -(-length // block_size)].long()].float()
    key, value = blocks.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length]
    return key, value


def _visible(num_queries: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [num_queries, length]: which keys each of the last `num_queries` positions sees."""
    query_positions = torch.arange(length - num_queries, length, device=device)[:, None]
    key_positions = torch.arange(length, device=device)[None, :]
    visible = key_positions <= query_positions
    if window is not None:
        visible &= query_positions - key_positions < window
    return visible


def _attend_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[n, Hq, D] of queries [n, Hq, D] over key, value [Hkv, length, D], all float32."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[0]
    # Keys that no query of this step sees may lie in freed blocks: 0 * NaN would poison the sum over values.
    value = torch.where(visible.any(0)[None, :, None], value, 0.0)
    grouped = query.view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = torch.einsum("nhgd,hld->hgnl", grouped, key) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = torch.where(visible, logits, float("-inf")).reshape(num_heads, *visible.shape)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().view(-1, 1, 1).expand(-1, num_queries, 1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : visible.shape[1]]
    weights = weights.view(num_kv_heads, num_heads // num_kv_heads, num_queries, visible.shape[1])
    return torch.einsum("hgnl,hld->nhgd", weights, value).reshape(num_queries, num_heads, head_dim)
