"""What every format promises, over the table of formats."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.openai.tools import FORMATS, make_parser, parser_class, resolve_format
from tests.router.openai.tools.conversation import CALLS, FRAGMENTS, TOOLS, WRITERS, parse

FORMAT_NAMES = list(FORMATS)
TEXTS = st.text(st.sampled_from("ab<>[]{}()\"'\\/|=:, \n\t\x00é｜🌍"), max_size=30)


def cut(text, places):
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
class TestCalls:
    def test_are_read_whole(self, name, calls):
        result = parse(make_parser(name, TOOLS), [WRITERS[name](calls)])
        assert result.values == calls
        assert result.content == ""
        assert result.reasoning == ""

    def test_are_read_character_by_character(self, name, calls):
        result = parse(make_parser(name, TOOLS), list(WRITERS[name](calls)))
        assert result.values == calls
        assert result.content == ""

    def test_that_break_off_are_no_valid_json_or_are_content(self, name, calls):
        text = WRITERS[name](calls[:1])
        for end in range(1, len(text)):
            result = parse(make_parser(name, TOOLS), [text[:end]])
            for (_, arguments), (_, expected) in zip(result.calls, calls, strict=False):
                if arguments != "":
                    try:
                        assert json.loads(arguments) == expected
                    except json.JSONDecodeError:
                        assert not text[end:].isspace()


@pytest.mark.parametrize("name", FORMAT_NAMES)
class TestText:
    def test_without_calls_is_content(self, name):
        text = "Hello <b>world</b>,\n\n a [list] of {things}: x < y. "
        for pieces in ([text], list(text)):
            result = parse(make_parser(name, TOOLS), pieces)
            assert (result.content, result.calls) == (text, [])

    def test_is_passed_on_at_once(self, name):
        parser = make_parser(name, TOOLS)
        parser.feed("The answer")
        assert parser.feed(" is 42.").content == " is 42."

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.sampled_from(FRAGMENTS), max_size=6), st.lists(st.integers(0, 10_000), max_size=8))
    def test_means_the_same_however_it_is_cut(self, name, fragments, places):
        text = "".join(fragments)
        whole = parse(make_parser(name, TOOLS), [text])
        assert parse(make_parser(name, TOOLS), cut(text, places)) == whole
        assert parse(make_parser(name, TOOLS), list(text)) == whole

    @settings(max_examples=30, deadline=None)
    @given(st.sampled_from(list(CALLS)), TEXTS, TEXTS, st.integers(0, 10_000))
    def test_around_or_within_calls_raises_nothing(self, name, calls, before, within, place):
        text = WRITERS[name](CALLS[calls])
        at = place % (len(text) + 1)
        text = before + text[:at] + within + text[at:]
        assert parse(make_parser(name, TOOLS), list(text)) == parse(make_parser(name, TOOLS), [text])


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if name not in ("llama3_json", "pythonic", "harmony")])
class TestMarkedCalls:
    def test_leave_the_text_before_and_after_them(self, name):
        text = f"Let me look.\n\n{WRITERS[name](CALLS['two'])}\nDone."
        result = parse(make_parser(name, TOOLS), list(text))
        assert result.values == CALLS["two"]
        assert result.content.split() == ["Let", "me", "look.", "Done."]

    def test_may_name_a_tool_that_the_request_lacks(self, name):
        result = parse(make_parser(name, TOOLS), [WRITERS[name]([("rm", {"path": "/"})])])
        assert result.values == [("rm", {"path": "/"})]


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_arguments_come_before_the_call_ends(name):
    if name == "pythonic":
        pytest.skip("passes each call on when it ends")
    text = WRITERS[name]([("get_weather", {"city": "x" * 100})])
    parser = make_parser(name, TOOLS)
    delta = parser.feed(text[: text.index("x") + 50])
    assert "x" * 40 in delta.tool_calls[0].arguments


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_ids_are_unique_and_look_as_clients_expect(name):
    parser = make_parser(name, TOOLS)
    calls = [call for delta in (parser.feed(WRITERS[name](CALLS["two"])), parser.finish()) for call in delta.tool_calls]
    ids = [call.id for call in calls if call.id]
    assert len(set(ids)) == 2
    if name == "mistral":  # whose templates refuse any other
        assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
    else:
        assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)


def test_the_table_names_classes_that_say_if_they_need_special_tokens():
    assert {name: parser_class(name).needs_special_tokens for name in FORMAT_NAMES} == {
        name: name != "qwen3_coder" for name in FORMAT_NAMES
    }


def test_formats_go_by_the_names_that_users_of_other_servers_know():
    assert resolve_format("openai", None, ()) == "harmony"
    assert resolve_format("qwen3_xml", None, ()) == "qwen3_coder"
    assert resolve_format("none", "{{ tools }}<tool_call>", ()) is None
    assert resolve_format("auto", None, ()) is None
    assert resolve_format("auto", "{{ tools }}<tool_call>", ()) == "hermes"
    with pytest.raises(ValueError, match=r"router.tool_call_format is 'nonsense'; it may be one of auto, none, hermes"):
        resolve_format("nonsense", None, ())
