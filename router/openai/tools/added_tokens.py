"""The tokens that a checkpoint's tokenizer has beside its vocabulary: markers of turns, calls and reasoning."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping


class AddedTokens:
    """Added tokens by their text; `in` tells whether there is one.

    Args:
        ids: of all added tokens.
        special: texts of those that are marked as special, and so left out of decoded text unless it is asked for.
    """

    def __init__(self, ids: Mapping[str, int], special: frozenset[str]) -> None:
        self._ids = dict(ids)
        self.special: dict[str, int] = {text: self._ids[text] for text in special}

    @classmethod
    def load(cls, checkpoint_dir: str) -> AddedTokens:
        """From tokenizer.json; none where the folder has no such file."""
        path = pathlib.Path(checkpoint_dir) / "tokenizer.json"
        if not path.is_file():
            return cls({}, frozenset())
        entries = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or ()
        ids = {entry["content"]: entry["id"] for entry in entries}
        return cls(ids, frozenset(entry["content"] for entry in entries if entry.get("special")))

    def __contains__(self, text: object) -> bool:
        return text in self._ids
