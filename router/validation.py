"""What clients may ask: every field of a GenerateRequest against its limit, and the defaults of those unset.

Pure functions. A breach raises `InvalidRequestError` that names the field and the limit.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Sequence

from baton.config import RouterConfig
from baton.errors import InvalidRequestError, ModelNotFoundError
from baton.requests import GrammarKind, SamplingParams
from baton.v1 import inference_pb2
from baton.wire import grammar_from_wire
from router.model_card import ModelCard, SamplingDefaults

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_MAX_SALT_CHARS = 256
_MAX_STOP_TOKEN_IDS = 1024
# On the wire, an upper bound: of one logprob with its token id, and its share of what frames it.
_LOGPROB_VALUE_BYTES = 24


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
    """Checks all that can be checked before the prompt is tokenised, but sampling and the request's id."""
    if request.model and request.model != card.name:
        raise ModelNotFoundError(f"model: {request.model!r} is not served; this is {card.name!r}")
    _check_length("cache_salt", request.cache_salt, _MAX_SALT_CHARS)
    if request.WhichOneof("prompt") is None:
        raise InvalidRequestError("prompt", "either text or token_ids is required")
    if request.WhichOneof("prompt") == "text" and not request.text:
        raise InvalidRequestError("prompt", "the text is empty")


def check_request_id(request_id: str) -> None:
    """Checks the client's name for a request, which logs, traces and answers repeat; empty where there is none."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError("request_id", "must have 1 to 128 visible ASCII characters")


def check_prompt_length(num_tokens: int, limits: Limits) -> None:
    """Checks how long a prompt is, which can be done before its ids are looked at."""
    if not num_tokens:
        raise InvalidRequestError("prompt", "must have at least one token")
    if num_tokens > limits.max_model_len - 1:
        raise InvalidRequestError(
            "prompt",
            f"has {num_tokens} tokens; the model takes at most {limits.max_model_len - 1} "
            f"(max_model_len {limits.max_model_len}, one of them generated)",
        )


def check_prompt(token_ids: Sequence[int], limits: Limits) -> None:
    """Checks a tokenised prompt."""
    check_prompt_length(len(token_ids), limits)
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
    _check_grammar(params, resolved, config)
    _check_prompt_logprobs(resolved, config, num_prompt_tokens)
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
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        grammar=grammar_from_wire(params.grammar) if params.HasField("grammar") else None,
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
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(params, name)) is not None:
            _check(name, count, count <= config.max_logprobs, f"must be at most {config.max_logprobs}")


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


def _check_grammar(params: inference_pb2.SamplingParams, resolved: SamplingParams, config: RouterConfig) -> None:
    """Checks what can be said without reading the grammar."""
    if params.HasField("grammar") and params.grammar.WhichOneof("kind") is None:
        kinds = ", ".join(kind.value for kind in GrammarKind)
        raise _invalid("grammar", f"needs one of {kinds}")
    if (grammar := resolved.grammar) is not None and grammar.num_bytes > config.max_grammar_bytes:
        raise _invalid("grammar", f"has {grammar.num_bytes} bytes; at most {config.max_grammar_bytes} are allowed")


def _check_prompt_logprobs(resolved: SamplingParams, config: RouterConfig, num_prompt_tokens: int) -> None:
    """They travel in one message, whose size is bounded."""
    if resolved.prompt_logprobs is None:
        return
    num_values = num_prompt_tokens * (resolved.prompt_logprobs + 1)
    limit = min(config.max_prompt_logprob_values, config.max_message_bytes // _LOGPROB_VALUE_BYTES)
    if num_values > limit:
        raise _invalid(
            "prompt_logprobs",
            f"{num_prompt_tokens} prompt tokens x ({resolved.prompt_logprobs} + 1) are {num_values} logprobs; "
            f"at most {limit} are allowed",
        )


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
    # To score a prompt or to have it sent back nothing need be generated.
    least = 0 if params.echo or resolved.prompt_logprobs is not None else 1
    rule = "must be at least 1, or 0 with echo or prompt_logprobs"
    _check("max_tokens", max_tokens, max_tokens >= least, rule)
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
