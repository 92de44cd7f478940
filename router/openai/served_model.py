"""What this API tells of the model: its name, its length, and a fingerprint of what serves it."""

from __future__ import annotations

import functools
import hashlib
import time

import baton
from baton.errors import ModelNotFoundError
from baton.hashing import model_identity
from router.membership import Membership
from router.model_card import ModelCard


class ServedModel:
    """The one model of this router; part of it is known only when a decode worker has joined."""

    def __init__(self, card: ModelCard, membership: Membership) -> None:
        self.name = card.name
        self.vocab_size = card.vocab_size
        self.created = int(time.time())
        self._membership = membership

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt plus completion, in tokens; None while no decode worker was seen."""
        return max((info.max_model_len for info in self._membership.decode_infos), default=None)

    @property
    def fingerprint(self) -> str:
        """Differs where the same seed may give other tokens: another model, another release of Baton."""
        infos = self._membership.decode_infos
        return _fingerprint(model_identity(infos[0].layout) if infos else self.name)

    def check(self, name: str) -> None:
        """Raises ModelNotFoundError where a request names another model; none is as good as this one."""
        if name and name != self.name:
            raise ModelNotFoundError(f"the model {name[:256]!r} does not exist here; this is {self.name!r}")


@functools.lru_cache(maxsize=8)
def _fingerprint(identity: str) -> str:
    return "fp_" + hashlib.sha256(f"{baton.__version__}\n{identity}".encode()).hexdigest()[:12]
