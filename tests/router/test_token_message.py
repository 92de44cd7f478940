from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import inference_pb2
from router.sink import token_response
from router.token_message import encode_request_id, encode_token

_ids = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@given(st.text(max_size=8), _ids, st.text(max_size=300), _ids)
def test_a_message_is_what_protobuf_makes_of_it(request_id: str, choice: int, text: str, token_id: int) -> None:
    encoded = encode_request_id(request_id) + encode_token(choice, text, token_id)
    expected = token_response(request_id, choice, text, token_id)
    assert inference_pb2.GenerateResponse.FromString(encoded) == expected
    assert encoded == expected.SerializeToString()
