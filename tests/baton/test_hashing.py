from __future__ import annotations

import hashlib
from typing import Any

import pytest

from baton.hashing import extend_chain, model_identity, root_hash
from baton.internal.v1 import transfer_pb2


def fingerprint(**changes: Any) -> transfer_pb2.LayoutFingerprint:
    fields: dict[str, Any] = {
        "model": "m",
        "revision": "r",
        "dtype": "bfloat16",
        "codec": "raw",
        "block_size": 16,
        "num_layers": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "groups": ["full:0,2", "sliding(128):1,3"],
    }
    return transfer_pb2.LayoutFingerprint(**(fields | changes))


def test_the_identity_is_the_whole_fingerprint() -> None:
    assert model_identity(fingerprint()) == "m|r|bfloat16|raw|16|4|2|64|full:0,2|sliding(128):1,3"


@pytest.mark.parametrize("field", [field.name for field in transfer_pb2.LayoutFingerprint.DESCRIPTOR.fields])
def test_every_field_of_the_fingerprint_changes_the_identity(field: str) -> None:
    value: Any = getattr(fingerprint(), field)
    other = ["full:0"] if field == "groups" else value + 1 if isinstance(value, int) else value + "x"
    assert model_identity(fingerprint(**{field: other})) != model_identity(fingerprint())


def test_the_root_depends_on_identity_and_salt_and_their_border() -> None:
    roots = {root_hash("a"), root_hash("b"), root_hash("a", "b"), root_hash("ab", "")}
    assert len(roots) == 4


def test_a_block_s_hash_is_that_of_its_parent_count_and_tokens() -> None:
    root = root_hash("m")
    tokens = (3).to_bytes(4, "little") + (70000).to_bytes(4, "little")
    assert extend_chain(root, [3, 70000], 2) == [hashlib.sha256(root + (2).to_bytes(4, "little") + tokens).digest()]


def test_only_full_blocks_are_hashed_and_the_chain_goes_on() -> None:
    root = root_hash("m")
    whole = extend_chain(root, range(10), 4)
    assert len(whole) == 2
    assert extend_chain(whole[0], range(4, 8), 4) == whole[1:]
    assert extend_chain(root, [1, 2, 3], 4) == []
