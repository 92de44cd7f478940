"""Streams one answer, then asks for a whole one: python examples/python/stream.py ["a prompt"]."""

import os
import sys

from baton.client import Client
from baton.errors import BatonError

PROMPT = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"

with Client(os.environ.get("BATON_TARGET", "127.0.0.1:50051"), api_key=os.environ.get("BATON_API_KEY")) as client:
    model = client.model_info()
    print(f"{model.name}: {model.architecture} in {model.dtype}, at most {model.max_model_len} tokens")
    try:
        # Leaving the loop early would cancel the request; `timeout_s` is the deadline of the whole call.
        for delta in client.stream(PROMPT, max_tokens=48, temperature=0.8, seed=7, timeout_s=60):
            print(delta.text, end="", flush=True)
            if delta.usage is not None and delta.timings is not None:
                print(f"\n{delta.usage}\n{delta.timings}")
        # The same seed gives the same text.
        answer = client.generate(PROMPT, max_tokens=48, temperature=0.8, seed=7, stop=["."])
        print(f"{answer.choices[0].finish_reason.name}: {answer.text}")
    except BatonError as error:
        sys.exit(f"{error.status}: {error}" + (" (may succeed if tried again)" if error.retryable else ""))
