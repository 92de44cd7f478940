import json

import pytest

from router.openai.tools import detect
from router.openai.tools.added_tokens import AddedTokens

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "vocab", "expected"),
    [
        (TOOLS + "<tool_call>\n{{ call | tojson }}\n</tool_call>", (), "hermes"),
        (TOOLS + "<tool_call>\n<function=example>\n<parameter=p>", (), "qwen3_coder"),
        (TOOLS + "<tool_call>{{ name }}\n<arg_key>", (), None),
        (TOOLS + "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]", ("[TOOL_CALLS]",), "mistral"),
        (TOOLS + "[TOOL_CALLS]{{ name }}[ARGS]", (), "mistral"),
        (TOOLS + '{"name": function name, "parameters": dictionary of argument name and its value}', (), "llama3_json"),
        (TOOLS + "in the format of [func_name1(params_name1=params_value1)]", ("<|python_tag|>",), "pythonic"),
        (TOOLS, ("<|python_tag|>",), "llama3_json"),
        (TOOLS, ("<|python_start|>", "<|python_tag|>"), "pythonic"),
        (
            "tool<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ type }}<｜tool▁sep｜>{{ name }}\n```json\n",
            (),
            "deepseek_v3",
        ),
        ("tool<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments }}", (), "deepseek_v31"),
        (TOOLS + "<|start|>assistant<|channel|>final<|message|>", (), "harmony"),
        (TOOLS, (), None),
        ("{{ messages }}", ("<|python_tag|>", "[TOOL_CALLS]"), None),
    ],
)
def test_the_template_tells_the_format(template, vocab, expected):
    assert detect(template, vocab) == expected


def test_added_tokens_are_read_from_the_checkpoint(tmp_path):
    entries = [
        {"id": 7, "content": "[TOOL_CALLS]", "special": True},
        {"id": 8, "content": "<tool_call>", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
    tokens = AddedTokens.load(str(tmp_path))
    assert "<tool_call>" in tokens
    assert "[ARGS]" not in tokens
    assert tokens.special == {"[TOOL_CALLS]": 7}


def test_a_checkpoint_without_a_tokenizer_file_has_none(tmp_path):
    assert AddedTokens.load(str(tmp_path)).special == {}
