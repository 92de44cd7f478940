"""Content hashes of KV blocks: the identity of cached prefixes in pools, tickets and the router's index.

A chain as in vLLM's prefix cache: h_i = SHA-256(h_{i-1} || u32 count || little-endian u32 tokens), so equal hashes mean
equal whole prefixes. The root is derived from a fixed public seed, the model's identity and the tenant's salt, so
independent processes agree and no request hits the blocks of another tenant.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

HASH_BYTES = 32
_SEED = b"baton/kv/1"


class Fingerprint(Protocol):
    """What `baton.internal.v1.LayoutFingerprint` says of a pool."""

    @property
    def model(self) -> str: ...

    @property
    def revision(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def codec(self) -> str: ...

    @property
    def block_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def groups(self) -> Iterable[str]: ...


def model_identity(fingerprint: Fingerprint) -> str:
    """The string that `root_hash` takes: equal exactly where KV bytes are interchangeable."""
    parts = (
        fingerprint.model,
        fingerprint.revision,
        fingerprint.dtype,
        fingerprint.codec,
        fingerprint.block_size,
        fingerprint.num_layers,
        fingerprint.num_kv_heads,
        fingerprint.head_dim,
        *fingerprint.groups,
    )
    return "|".join(map(str, parts))


def root_hash(identity: str, cache_salt: str = "") -> bytes:
    """The parent of a sequence's first block: 32 bytes.

    Args:
        identity: of `model_identity`; what must be equal for KV bytes to be interchangeable.
        cache_salt: the tenant's salt; the chain carries it into every block.
    """
    digest = hashlib.sha256(_SEED)
    for part in (identity.encode(), cache_salt.encode()):
        digest.update(struct.pack("<I", len(part)))
        digest.update(part)
    return digest.digest()


def extend_chain(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of `token_ids`, which follow the block whose hash is `parent`.

    A trailing partial block has no hash. Cost: about 1 us a block.
    """
    num_blocks = len(token_ids) // block_size
    if num_blocks == 0:
        return []
    tokens = np.asarray(token_ids[: num_blocks * block_size], dtype="<u4").tobytes()
    count = struct.pack("<I", block_size)
    stride = 4 * block_size
    hashes = []
    for start in range(0, len(tokens), stride):
        parent = hashlib.sha256(parent + count + tokens[start : start + stride]).digest()
        hashes.append(parent)
    return hashes
