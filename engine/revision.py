"""What tells two checkpoints apart, so that KV of one is never read with the weights of the other."""

from __future__ import annotations

import hashlib
import pathlib

_SAMPLE_BYTES = 1 << 16


def checkpoint_revision(path: pathlib.Path) -> str:
    """16 hex digits over config.json and, of each safetensors file, its name, its size, its head and its tail.

    Samples rather than whole files, so that it costs milliseconds for any size; independent processes agree on it.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
