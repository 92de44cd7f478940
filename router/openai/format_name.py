"""How a setting names the form of what a model writes: by name or alias, "auto" to guess it, "none" for none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping


def resolve_format_name(
    setting: str,
    configured: str,
    chat_template: str | None,
    vocab: Container[str],
    *,
    formats: Collection[str],
    aliases: Mapping[str, str],
    detect: Callable[[str, Container[str]], str | None],
) -> str | None:
    """The format that is served; None for none.

    Args:
        setting: its name, for the error.
        configured: its value.
        chat_template: of the checkpoint; without one nothing can be guessed.
        detect: guesses from the template and the vocabulary.

    Raises:
        ValueError: no format has that name.
    """
    if configured == "none":
        return None
    if configured == "auto":
        return None if chat_template is None else detect(chat_template, vocab)
    name = aliases.get(configured, configured)
    if name not in formats:
        known = ", ".join(["auto", "none", *formats, *aliases])
        raise ValueError(f"{setting} is {configured!r}; it may be one of {known}")
    return name
