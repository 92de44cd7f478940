"""A load generator's client: sends and counts as the request functions of vLLM's benchmark do.

Those split the stream wherever bytes came in, strip each piece, count every event that has choices as a token, and take
the number of tokens from an event without choices.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import time
from typing import Any

import httpx


@dataclasses.dataclass
class Measured:
    """One request as the generator reports it; times in seconds."""

    text: str = ""
    num_events: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    gaps_s: list[float] = dataclasses.field(default_factory=list)


async def complete(client: httpx.AsyncClient, model: str, prompt: str | list[int], num_tokens: int) -> Measured:
    """As the backend "openai" does."""
    payload = {
        "model": model,
        "prompt": prompt,
        "repetition_penalty": 1.0,
        "max_tokens": num_tokens,
        "logprobs": None,
        "temperature": 0.0,
    }
    return await _measure(client, "/v1/completions", payload)


async def chat(client: httpx.AsyncClient, model: str, prompt: str, num_tokens: int) -> Measured:
    """As the backend "openai-chat" does."""
    messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    payload = {"model": model, "messages": messages, "max_completion_tokens": num_tokens, "temperature": 0.0}
    return await _measure(client, "/v1/chat/completions", payload)


async def _measure(client: httpx.AsyncClient, path: str, payload: dict[str, Any]) -> Measured:
    payload |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    measured = Measured()
    messages = _Messages()
    last_at = began_at = time.perf_counter()
    async with client.stream("POST", path, json=payload) as response:
        assert response.status_code == 200, await response.aread()
        async for chunk in response.aiter_raw():
            for message in messages.add(chunk.strip()):
                if message == "[DONE]":
                    continue
                event = json.loads(message)
                if choices := event.get("choices"):
                    now = time.perf_counter()
                    if measured.num_events:
                        measured.gaps_s.append(now - last_at)
                    else:
                        measured.ttft_s = now - began_at
                    last_at = now
                    measured.num_events += 1
                    measured.text += _text(choices[0])
                elif usage := event.get("usage"):
                    measured.output_tokens = usage["completion_tokens"]
                    measured.prompt_tokens = usage["prompt_tokens"]
    return measured


def _text(choice: dict[str, Any]) -> str:
    return (choice["delta"].get("content") if "delta" in choice else choice.get("text")) or ""


class _Messages:
    """Whole messages out of pieces that were stripped, so that two may stand together without a blank line."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._buffer = ""

    def add(self, piece: bytes) -> list[str]:
        self._buffer += self._decode(piece)
        *messages, self._buffer = self._buffer.split("\n\n")
        rest = self._buffer.removeprefix("data: ").strip()
        if self._buffer.startswith("data: ") and (rest == "[DONE]" or _is_json(rest)):
            messages.append(self._buffer)
            self._buffer = ""
        return [message.strip().removeprefix("data: ") for message in messages if message.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
