"""How attention is cut into programs."""

from __future__ import annotations

from typing import Any

import pytest

from engine.kernels.attention.plan import Plan, plan
from engine.kernels.gpu import Gpu
from engine.kernels.tiles import AttentionTile, attention_tile, product_tile

HOPPER = Gpu("sm_90", 132)


def cut(num_tokens: int, num_sequences: int, max_query_len: int, max_seq_len: int, **changes: Any) -> Plan:
    """Of a layer with 32 query and 8 key/value heads of 128 dimensions in bfloat16."""
    arguments: dict[str, Any] = {
        "num_kv_heads": 8, "group": 4, "head_dim": 128, "itemsize": 2, "window": None, "batch_invariant": False,
    }  # fmt: skip
    return plan(
        HOPPER,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        **(arguments | changes),
    )


def test_a_few_decodes_over_long_contexts_are_split_to_fill_the_gpu() -> None:
    made = cut(1, 1, 1, 131072)
    assert made.decode
    assert made.query_blocks == 1
    assert 200 <= 8 * made.segments <= 264


def test_many_decodes_and_short_contexts_are_not_split() -> None:
    assert cut(256, 256, 1, 8192).segments == 1
    assert cut(1, 1, 1, 600).segments == 1


def test_a_window_bounds_what_is_split() -> None:
    assert cut(1, 1, 1, 131072, window=1024).segments == 2
    assert cut(1, 1, 1, 131072, window=128).segments == 1


def test_chunks_are_cut_into_tall_tiles() -> None:
    made = cut(2048, 3, 2046, 9000)
    assert not made.decode
    assert made.tile.rows >= 64
    assert made.query_blocks == 2048 // (made.tile.rows // 4) + 3


def test_wide_groups_get_taller_tiles() -> None:
    assert cut(1, 1, 1, 100, num_kv_heads=1, group=71).tile.rows == 128


def test_in_batch_invariant_mode_nothing_depends_on_the_batch() -> None:
    made = [cut(1, 1, 1, 131072, batch_invariant=True), cut(4096, 9, 4000, 5000, batch_invariant=True)]
    assert made[0].tile == made[1].tile
    assert [each.segments for each in made] == [1, 1]


def test_sequences_without_queries_are_no_decodes() -> None:
    assert not cut(2, 3, 1, 100).decode


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_89", "sm_90", "sm_103", "sm_120", "gfx942", "gfx1100"])
def test_every_gpu_is_served_in_every_shape(architecture: str) -> None:
    for rows in (1, 16, 5000):
        for head_dim in (16, 64, 128, 256):
            for itemsize in (2, 4):
                tile = attention_tile(architecture, rows=rows, head_dim=head_dim, itemsize=itemsize)
                assert tile.rows % 16 == tile.keys % 16 == 0
    assert product_tile(architecture, itemsize=4) != product_tile(architecture, itemsize=2)


def test_gpus_are_served_by_what_they_are_like() -> None:
    def tile(architecture: str) -> AttentionTile:
        return attention_tile(architecture, rows=16, head_dim=128, itemsize=2)

    assert tile("sm_100").descriptors
    assert not tile("sm_80").descriptors
    # Its shared memory is 99 KB.
    assert tile("sm_120") == tile("sm_89") == tile("sm_80")
    assert Gpu("sm_120", 188).has_descriptors


def test_wider_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim: 512 is above the 256"):
        attention_tile("sm_90", rows=1, head_dim=512, itemsize=2)
