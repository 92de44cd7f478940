import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.openai.tools.json_scanner import JsonScanner

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab\\"\n\té🌍'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=3), inner, max_size=3),
    max_leaves=8,
)


def scan(text):
    """(the JSON that was read, where reading stopped, whether the value is whole), fed character by character."""
    scanner = JsonScanner()
    read = ""
    for position in range(len(text)):
        piece, stop = scanner.scan(text[: position + 1], position)
        read += piece
        if scanner.done or scanner.failed:
            return read, stop, scanner.done
    return read, len(text), scanner.finish()


@settings(max_examples=50, deadline=None)
@given(VALUES, st.sampled_from([None, 2]), st.sampled_from(["", " ", "}", "<end>"]))
def test_a_value_ends_where_it_ends(value, indent, after):
    text = json.dumps(value, indent=indent)
    assert scan(text + after) == (text, len(text), True)


@settings(max_examples=50, deadline=None)
@given(st.text('{}[]",:\\u0123456789eE+-. truefalsn', max_size=12).map(str.lstrip))
def test_takes_what_python_takes(text):
    read, stop, done = scan(text)
    if done:
        json.loads(read)
        assert read == text[:stop]
    else:
        with pytest.raises(json.JSONDecodeError):
            json.loads(text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"a": 01}', '{"a": 0'),
        ('{"a" 1}', '{"a" '),
        ("{'a': 1}", "{"),
        ("[1,]", "[1,"),
        ('{"a":1,}', '{"a":1,'),
        ("nul1", "nul"),
        ('"\\x"', '"\\'),
        ('{"a": NaN}', '{"a": '),
        ("[1}", "[1"),
        ("1.e5", "1."),
        ("-", "-"),
        ("[+1]", "["),
    ],
)
def test_stops_before_what_is_no_json(text, read):
    assert scan(text) == (read, len(read), False)


def test_escapes_bare_control_characters():
    assert scan('"a\nb\tc\x01"')[0] == '"a\\nb\\tc\\u0001"'


def test_refuses_what_is_nested_too_deeply_or_longer_than_any_number():
    assert scan("[" * 200)[1:] == (128, False)
    assert scan("1" * 500)[2] is False
