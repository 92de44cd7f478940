"""Sends requests together with asyncio, with a retry where one helps, and prints answers as they end."""

import asyncio
import os
import random

from baton.client import AsyncClient, Completion
from baton.errors import BatonError

PROMPTS = ["Once upon a time", "User: what is 12+7?\nBot:", "User: what is 3+4?\nBot:", "One day, a little dog"]
MAX_TRIES = 4


async def generate(client: AsyncClient, prompt: str) -> Completion:
    """One answer. An error that says so is worth another try, each after a longer pause with some chance in it."""
    for tried in range(1, MAX_TRIES + 1):
        try:
            return await client.generate(prompt, max_tokens=32, temperature=0, timeout_s=60)
        except BatonError as error:
            if not error.retryable or tried == MAX_TRIES:
                raise
            await asyncio.sleep(random.uniform(0, 0.2 * 2**tried))
    raise AssertionError("unreachable")


async def main() -> None:
    async with AsyncClient(
        os.environ.get("BATON_TARGET", "127.0.0.1:50051"), api_key=os.environ.get("BATON_API_KEY")
    ) as client:
        for answering in asyncio.as_completed([generate(client, prompt) for prompt in PROMPTS]):
            answer = await answering
            print(f"{answer.usage.completion_tokens:3} tokens in {answer.timings.decode_s:.3f} s: {answer.text!r}")


asyncio.run(main())
