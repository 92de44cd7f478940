"""Encodes what nearly all messages of a gRPC stream are: responses with one token and nothing more to tell.

Making such a message and having protobuf serialise it takes three times as long, and most tokens come again and again.
"""

from __future__ import annotations

import functools

from google.protobuf.descriptor import FieldDescriptor

from baton.v1 import inference_pb2

# Tokens that are remembered: about two megabytes.
_MAX_REMEMBERED = 8192
# Wire types of https://protobuf.dev/programming-guides/encoding.
_VARINT, _LEN = 0, 2


def _tag(field: FieldDescriptor, wire_type: int) -> bytes:
    """What stands before a field's value; that of a field beyond the 15th would be longer."""
    return bytes([field.number << 3 | wire_type])


_response_fields = inference_pb2.GenerateResponse.DESCRIPTOR.fields_by_name
_delta_fields = inference_pb2.ChoiceDelta.DESCRIPTOR.fields_by_name
_CHOICES = _tag(_response_fields["choices"], _LEN)
_INDEX = _tag(_delta_fields["index"], _VARINT)
_TEXT = _tag(_delta_fields["text"], _LEN)
_TOKEN_IDS = _tag(_delta_fields["token_ids"], _LEN)


def encode_request_id(request_id: str) -> bytes:
    """What stands before the token in every message of a request: a message's fields may be encoded one by one."""
    return inference_pb2.GenerateResponse(request_id=request_id).SerializeToString()


@functools.lru_cache(_MAX_REMEMBERED)
def encode_token(choice: int, text: str, token_id: int) -> bytes:
    """The only choice of the message: its index, its text and its token id; of a first choice or no text nothing."""
    delta = _TOKEN_IDS + _with_length(_varint(token_id))
    if text:
        delta = _TEXT + _with_length(text.encode()) + delta
    if choice:
        delta = _INDEX + _varint(choice) + delta
    return _CHOICES + _with_length(delta)


def _with_length(value: bytes) -> bytes:
    return _varint(len(value)) + value


def _varint(number: int) -> bytes:
    """Seven bits in each byte, the lowest first; all but the last have the highest bit set."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
