"""What clients may ask: every field of a GenerateRequest against its limit, and the defaults of those unset.

Pure functions. A breach raises `InvalidRequestError` that names the field and the limit.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

from baton.config import RouterConfig
from baton.errors import InvalidRequestError, ModelNotFoundError
from baton.requests import SamplingParams
from baton.v1 import inference_pb2
from router.model_card import ModelCard, SamplingDefaults

_MAX_REQUEST_ID_CHARS = 128
_MAX_SALT_CHARS = 256
_MAX_STOP_TOKEN_IDS = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the cluster can hold.

    Attributes:
        max_model_len: longest prompt plus completion, in tokens.
        max_sequence_tokens: most tokens of one request that the roomiest decode worker can hold alone.
    """

    vocab_size: int
    max_model_len: int
    max_sequence_tokens: int
    block_size: int = 16


def check_envelope(request: inference_pb2.GenerateRequest, card: ModelCard) -> None:
    """Checks all that can be checked before the prompt is tokenised, but sampling."""
    if request.model and request.model != card.name:
        raise ModelNotFoundError(f"model: {request.model!r} is not served; this is {card.name!r}")
    _check_length("request_id", request.request_id, _MAX_REQUEST_ID_CHARS)
    _check_length("cache_salt", request.cache_salt, _MAX_SALT_CHARS)
    if request.WhichOneof("prompt") is None:
        raise InvalidRequestError("prompt", "either text or token_ids is required")
    if request.WhichOneof("prompt") == "text" and not request.text:
        raise InvalidRequestError("prompt", "the text is empty")


def check_prompt(token_ids: Sequence[int], limits: Limits) -> None:
    """Checks a tokenised prompt."""
    if not token_ids:
        raise InvalidRequestError("prompt", "must have at least one token")
    if len(token_ids) > limits.max_model_len - 1:
        raise InvalidRequestError(
            "prompt",
            f"has {len(token_ids)} tokens; the model takes at most {limits.max_model_len - 1} "
            f"(max_model_len {limits.max_model_len}, one of them generated)",
        )
    if max(token_ids) >= limits.vocab_size:
        raise InvalidRequestError("token_ids", f"{max(token_ids)} is not below the vocabulary's {limits.vocab_size}")


def resolve_sampling(
    params: inference_pb2.SamplingParams,
    *,
    num_prompt_tokens: int,
    card: ModelCard,
    limits: Limits,
    config: RouterConfig,
) -> SamplingParams:
    """Checked sampling parameters with every default resolved: the request's, else the model's, else the API's."""
    resolved = _with_defaults(params, card)
    _check_numbers(resolved, config)
    _check_stops(params, config, limits)
    _check_logit_bias(params, config, limits)
    return dataclasses.replace(
        resolved, max_tokens=_max_tokens(params, resolved, num_prompt_tokens=num_prompt_tokens, limits=limits)
    )


def _with_defaults(params: inference_pb2.SamplingParams, card: ModelCard) -> SamplingParams:
    defaults: SamplingDefaults = card.sampling
    return SamplingParams(
        max_tokens=0,
        temperature=params.temperature if params.HasField("temperature") else defaults.temperature,
        top_p=params.top_p if params.HasField("top_p") else defaults.top_p,
        top_k=params.top_k if params.HasField("top_k") else defaults.top_k,
        min_p=params.min_p if params.HasField("min_p") else defaults.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=(
            params.repetition_penalty if params.HasField("repetition_penalty") else defaults.repetition_penalty
        ),
        seed=params.seed if params.HasField("seed") else random.getrandbits(64),
        n=params.n if params.HasField("n") else 1,
        eos_token_ids=() if params.ignore_eos else card.eos_token_ids,
        stop_token_ids=tuple(params.stop_token_ids),
        min_tokens=params.min_tokens,
        logit_bias=dict(params.logit_bias),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
    )


def _check_numbers(params: SamplingParams, config: RouterConfig) -> None:
    _check("temperature", params.temperature, params.temperature >= 0, "must be finite and at least 0")
    _check("top_p", params.top_p, 0 < params.top_p <= 1, "must be above 0 and at most 1")
    _check("min_p", params.min_p, 0 <= params.min_p <= 1, "must be from 0 to 1")
    for name in ("presence_penalty", "frequency_penalty"):
        value: float = getattr(params, name)
        _check(name, value, -2 <= value <= 2, "must be from -2 to 2")
    _check("repetition_penalty", params.repetition_penalty, params.repetition_penalty > 0, "must be finite and above 0")
    _check("n", params.n, 1 <= params.n <= config.max_n, f"must be from 1 to {config.max_n}")
    if params.logprobs is not None:
        _check(
            "logprobs",
            params.logprobs,
            params.logprobs <= config.max_logprobs,
            f"must be at most {config.max_logprobs}",
        )


def _check_stops(params: inference_pb2.SamplingParams, config: RouterConfig, limits: Limits) -> None:
    if len(params.stop) > config.max_stop_strings:
        raise _invalid("stop", f"has {len(params.stop)} strings; at most {config.max_stop_strings} are allowed")
    for stop in params.stop:
        if not 1 <= len(stop) <= config.max_stop_string_chars:
            raise _invalid("stop", f"strings must have 1 to {config.max_stop_string_chars} characters, got {len(stop)}")
    if len(params.stop_token_ids) > _MAX_STOP_TOKEN_IDS:
        raise _invalid(
            "stop_token_ids", f"has {len(params.stop_token_ids)} ids; at most {_MAX_STOP_TOKEN_IDS} are allowed"
        )
    for token_id in params.stop_token_ids:
        _check_in_vocabulary("stop_token_ids", token_id, limits)


def _check_logit_bias(params: inference_pb2.SamplingParams, config: RouterConfig, limits: Limits) -> None:
    if len(params.logit_bias) > config.max_logit_bias:
        raise _invalid(
            "logit_bias", f"has {len(params.logit_bias)} tokens; at most {config.max_logit_bias} are allowed"
        )
    for token_id, bias in params.logit_bias.items():
        _check_in_vocabulary("logit_bias", token_id, limits)
        _check("logit_bias", bias, -100 <= bias <= 100, "must be from -100 to 100")


def _max_tokens(
    params: inference_pb2.SamplingParams, resolved: SamplingParams, *, num_prompt_tokens: int, limits: Limits
) -> int:
    """Tokens to generate for each choice, within the model's length and one decode worker's pool."""
    rest = limits.max_model_len - num_prompt_tokens
    roomy = _max_tokens_in_pool(num_prompt_tokens, resolved.n, limits)
    if roomy < 1:
        raise InvalidRequestError(
            "prompt",
            f"has {num_prompt_tokens} tokens; with n {resolved.n} that does not fit a decode worker, "
            f"which holds {limits.max_sequence_tokens}",
        )
    max_tokens = params.max_tokens if params.HasField("max_tokens") else min(rest, roomy)
    _check("max_tokens", max_tokens, max_tokens >= 1, "must be at least 1")
    if max_tokens > rest:
        raise _invalid(
            "max_tokens",
            f"{max_tokens} and the prompt's {num_prompt_tokens} tokens exceed max_model_len {limits.max_model_len}",
        )
    if max_tokens > roomy:
        raise _invalid(
            "max_tokens",
            f"{max_tokens} and the prompt's {num_prompt_tokens} tokens with n {resolved.n} exceed what a decode worker "
            f"holds, {limits.max_sequence_tokens} tokens",
        )
    _check(
        "min_tokens", resolved.min_tokens, resolved.min_tokens <= max_tokens, f"must be at most max_tokens {max_tokens}"
    )
    return max_tokens


def _max_tokens_in_pool(num_prompt_tokens: int, num_choices: int, limits: Limits) -> int:
    """Tokens that each choice may grow by in the pool of one worker: choices share the prompt's full blocks only."""
    if num_choices == 1:
        return limits.max_sequence_tokens - num_prompt_tokens
    shared = num_prompt_tokens // limits.block_size * limits.block_size
    each = (limits.max_sequence_tokens - shared) // num_choices // limits.block_size * limits.block_size
    return each - (num_prompt_tokens - shared)


def _check(field: str, value: float, holds: bool, rule: str) -> None:
    if not holds or not math.isfinite(value):
        raise _invalid(field, f"{rule}, got {value:g}")


def _check_in_vocabulary(field: str, token_id: int, limits: Limits) -> None:
    if token_id >= limits.vocab_size:
        raise _invalid(field, f"{token_id} is not below the vocabulary's {limits.vocab_size}")


def _check_length(field: str, value: str, max_chars: int) -> None:
    if len(value) > max_chars:
        raise InvalidRequestError(field, f"has {len(value)} characters; at most {max_chars} are allowed")


def _invalid(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"sampling.{field}", problem)
