"""`POST /v1/completions`: what may be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic

from baton.v1 import inference_pb2
from router.openai.errors import ApiError, refused, shown
from router.openai.fields import GenerationFields, UInt32

# Text, or token ids.
Prompt = str | list[int]

_DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields):
    """One to many prompts, each answered n times."""

    prompt: Any = pydantic.Field()
    echo: bool = False
    logprobs: UInt32 | None = None
    add_special_tokens: bool = True

    def prompts(self, max_prompts: int, max_model_len: int | None) -> list[Prompt]:
        """The prompts, their ids not checked against the model; ApiError where they are not formed as they must be.

        Args:
            max_model_len: lists that are too long for the model are refused before they are gone through, but if they
                are to be truncated; None where it is not known yet.
        """
        prompts = read_prompts(self.prompt, None if self.truncate_prompt_tokens is not None else max_model_len)
        if len(prompts) > max_prompts:
            raise refused("prompt", f"has {len(prompts)} prompts; at most {max_prompts} are allowed")
        return prompts

    def sampling(self) -> inference_pb2.SamplingParams:
        sampling = super().sampling()
        if self.max_tokens is None:
            sampling.max_tokens = max(_DEFAULT_MAX_TOKENS, self.min_tokens)
        if self.logprobs is not None:
            sampling.logprobs = self.logprobs
        # Nothing to generate: all that is wanted is the prompt, which is computed for its logprobs alone.
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            sampling.prompt_logprobs = max(self.logprobs or 0, sampling.prompt_logprobs)
        sampling.echo = self.echo or self.return_token_ids or self.continuous_usage
        return sampling

    def field_names(self) -> dict[str, str]:
        names = super().field_names() | {"token_ids": "prompt"}
        return names | {"prompt_logprobs": "logprobs"} if self.prompt_logprobs is None else names


def read_prompts(given: Any, max_model_len: int | None = None) -> list[Prompt]:
    """One or many prompts, each as text or as token ids."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise _not_a_prompt(given)
    if not given:
        raise refused("prompt", "is empty")
    if _is_id(given[0]):
        return [_token_ids("prompt", given, max_model_len)]
    kind = type(given[0])
    return [_one_of_many(f"prompt[{index}]", each, kind, max_model_len) for index, each in enumerate(given)]


def _one_of_many(field: str, prompt: Any, kind: type, max_model_len: int | None) -> Prompt:
    if not isinstance(prompt, kind) or not isinstance(prompt, str | list):
        raise _not_a_prompt(prompt, field)
    return prompt if isinstance(prompt, str) else _token_ids(field, prompt, max_model_len)


def _token_ids(field: str, ids: Sequence[Any], max_model_len: int | None) -> list[int]:
    if not ids:
        raise refused(field, "must have at least one token")
    if max_model_len is not None and len(ids) >= max_model_len:
        problem = f"has {len(ids)} tokens; the model takes at most {max_model_len - 1} (max_model_len {max_model_len})"
        raise refused(field, problem, "context_length_exceeded")
    # Fast over long lists; which one is wrong matters only if one is.
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= 2**32:
        wrong = next(index for index, each in enumerate(ids) if not _is_id(each))
        raise refused(f"{field}[{wrong}]", f"must be a token id, got {shown(ids[wrong])}", "invalid_type")
    return list(ids)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _not_a_prompt(given: Any, field: str = "prompt") -> ApiError:
    problem = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    return refused(field, f"{problem}, got {shown(given)}", "invalid_type")
