"""Which format of tool calls a checkpoint was made for, guessed from its chat template and its tokens."""

from __future__ import annotations

from collections.abc import Container

_PYTHON_CALL = ("[func_name1(", "[func_name(", "func_name1(params_name1")
_JSON_CALL = (
    '"parameters": dictionary of argument name',
    '{"name": function name',
    "respond with a JSON for a function call",
)


def detect(chat_template: str, vocab: Container[str]) -> str | None:
    """The name of a format, or None where the template offers no tools or is of no known kind.

    Args:
        chat_template: text of the template for requests with tools.
        vocab: tokens that the tokenizer has, at least the added ones.
    """
    template = chat_template
    if "tool" not in template:
        return None
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if "<｜tool▁call▁begin｜>" in template:
        # Where the kind of the tool is not written, the name comes first: DeepSeek-V3.1.
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        # GLM writes its arguments as pairs of tags, which none of the formats reads.
        return None if "<arg_key>" in template else "hermes"
    if "[TOOL_CALLS]" in template or "[AVAILABLE_TOOLS]" in template:
        return "mistral"
    if any(text in template for text in _PYTHON_CALL):
        return "pythonic"
    if any(text in template for text in _JSON_CALL):
        return "llama3_json"
    if "tools" not in template:
        return None
    if "<|python_start|>" in vocab:
        return "pythonic"
    return "llama3_json" if "<|python_tag|>" in vocab else None
