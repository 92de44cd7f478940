import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.openai.reasoning import ReasoningParser, detect_reasoning, resolve_reasoning, thinking_at
from router.openai.tools import make_parser
from tests.router.openai.tools.conversation import CALLS, TOOLS, WRITERS, parse


def split(thinking, text):
    result = parse(ReasoningParser(thinking), [text])
    assert parse(ReasoningParser(thinking), list(text)) == result
    return result.reasoning, result.content


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        ("open", "Rain?\n\nYes.\n</think>\n\nIt rains.\n", ("Rain?\n\nYes.", "It rains.\n")),
        ("open", "<think>\nRain?</think>It rains.", ("Rain?", "It rains.")),
        ("open", "Rain? And then the length is reached", ("Rain? And then the length is reached", "")),
        ("open", "a < b </thin k> c\n", ("a < b </thin k> c", "")),
        ("open", "</think>", ("", "")),
        ("optional", "\n<think>\nRain?\n</think>\nIt rains.", ("Rain?", "It rains.")),
        ("optional", "<think>\n\n</think>\n\nIt rains.", ("", "It rains.")),
        ("optional", "  It rains. <think>x</think>", ("", "  It rains. <think>x</think>")),
        ("optional", "<thi", ("", "<thi")),
        ("optional", "", ("", "")),
        ("none", "<think>x</think>", ("", "<think>x</think>")),
    ],
)
def test_reasoning_and_content(thinking, text, expected):
    assert split(thinking, text) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["open", "optional", "none"]),
    st.lists(st.sampled_from(["<think>", "</think>", "</thi", "<", "\n", " ", "text", "é"]), max_size=10),
)
def test_means_the_same_however_it_is_cut(thinking, pieces):
    text = "".join(pieces)
    assert parse(ReasoningParser(thinking), pieces) == parse(ReasoningParser(thinking), [text])
    split(thinking, text)


def test_reasoning_is_passed_on_as_it_comes():
    parser = ReasoningParser("open")
    assert parser.feed("Rain").reasoning == "Rain"
    assert parser.feed(" or sun?").reasoning == " or sun?"


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "qwen3_coder", "pythonic"])
def test_calls_follow_the_reasoning(name):
    text = f"Rain?\n</think>\n\n{WRITERS[name](CALLS['one'])}"
    for pieces in ([text], list(text)):
        result = parse(ReasoningParser("open", make_parser(name, TOOLS)), pieces)
        assert (result.reasoning, result.content, result.values) == ("Rain?", "", CALLS["one"])


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        (None, "<think>\n", "none"),
        ("qwen3", "<|im_start|>assistant\n<think>\n", "open"),
        ("qwen3", "<|im_start|>assistant\n", "optional"),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "none"),
        ("deepseek_r1", "<｜Assistant｜>", "open"),
        ("deepseek_r1", "What is <think>?<｜Assistant｜><think>\n", "open"),
        ("deepseek_r1", "<｜Assistant｜></think>", "none"),
    ],
)
def test_the_prompt_tells_whether_the_model_thinks(name, prompt, expected):
    assert thinking_at(name, prompt) == expected


@pytest.mark.parametrize(
    ("template", "vocab", "expected"),
    [
        ("{% if enable_thinking %}<think></think>", (), "qwen3"),
        ("<｜Assistant｜>{{ content.split('</think>')[-1] }}", (), "deepseek_r1"),
        ("<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}", (), "qwen3"),
        ("{{ messages }}", ("<think>", "</think>"), "qwen3"),
        ("{{ messages }}", (), None),
        ("<|channel|></think>", (), None),
    ],
)
def test_the_template_tells_the_format(template, vocab, expected):
    assert detect_reasoning(template, vocab) == expected
    assert resolve_reasoning("auto", template, vocab) == expected


def test_the_configuration_may_name_the_format():
    assert resolve_reasoning("none", "</think>", ()) is None
    assert resolve_reasoning("auto", None, ()) is None
    assert resolve_reasoning("deepseek_r1", None, ()) == "deepseek_r1"
    with pytest.raises(
        ValueError, match=r"router.reasoning_format is 'x'; it may be one of auto, none, deepseek_r1, qwen3"
    ):
        resolve_reasoning("x", None, ())
