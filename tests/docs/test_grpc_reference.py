from __future__ import annotations

import subprocess
import sys

from baton.v1 import inference_pb2
from tests.docs.markdown import DOCS, REPOSITORY

PAGE = DOCS / "grpc-reference.md"


def test_the_reference_is_what_the_proto_says() -> None:
    generated = subprocess.run(
        [sys.executable, REPOSITORY / ".ci" / "grpc_reference.py"], capture_output=True, text=True, check=True
    )
    assert PAGE.read_text() == generated.stdout, "run .venv/bin/python .ci/grpc_reference.py --write"


def test_every_call_field_and_value_is_in_it() -> None:
    """Against the compiled descriptors, which the generator does not read."""
    page = PAGE.read_text()
    for service in inference_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            assert f"| {method.name} | [{method.input_type.name}]" in page
    for message in inference_pb2.DESCRIPTOR.message_types_by_name.values():
        section = page.partition(f"\n## {message.name}\n")[2].partition("\n## ")[0]
        for field in message.fields:
            assert f"| `{field.name}` |" in section, f"{message.name}.{field.name}"
            assert f"| {field.number} |" in section, f"{message.name}.{field.name}"
    for enum in inference_pb2.DESCRIPTOR.enum_types_by_name.values():
        for value in enum.values:
            assert f"| `{value.name}` | {value.number} |" in page
