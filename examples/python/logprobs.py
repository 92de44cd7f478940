"""Prints each token of an answer with its probability and those of its rivals."""

import math
import os

from baton.client import Client

with Client(os.environ.get("BATON_TARGET", "127.0.0.1:50051"), api_key=os.environ.get("BATON_API_KEY")) as client:
    # Of the model's distribution, before temperature and filters; 3 rivals beside the token that was taken.
    answer = client.generate("Once upon a time", max_tokens=8, temperature=0, logprobs=3)
    choice = answer.choices[0]
    for token_id, logprobs in zip(choice.token_ids, choice.logprobs, strict=True):
        rivals = ", ".join(f"{client.detokenize([rival])!r} {math.exp(value):.3f}" for rival, value in logprobs.top)
        print(f"{client.detokenize([token_id])!r:12} {math.exp(logprobs.sampled):.3f}   of {rivals}")
    total = sum(logprobs.sampled for logprobs in choice.logprobs)
    print(f"perplexity {math.exp(-total / len(choice.logprobs)):.3f}")
