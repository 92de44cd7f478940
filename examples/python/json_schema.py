"""Asks for an answer that a JSON schema describes: whatever the model, what comes can be parsed."""

import json
import os

from baton.client import Client

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "mood": {"enum": ["happy", "sad"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}

with Client(os.environ.get("BATON_TARGET", "127.0.0.1:50051"), api_key=os.environ.get("BATON_API_KEY")) as client:
    # The answer ends when the object does; only too few tokens could break it off.
    answer = client.generate("A little girl, as JSON: ", json_schema=SCHEMA, max_tokens=200, temperature=0)
    print(json.loads(answer.text))
    answer = client.generate("Today the sky is ", choice=["blue", "grey", "red"], max_tokens=8, temperature=0)
    print(answer.text)
