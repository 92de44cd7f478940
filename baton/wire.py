"""Conversions between `baton.requests` and the internal wire messages: the one place that knows both."""

from __future__ import annotations

from collections.abc import Sequence

from baton.internal.v1 import transfer_pb2, worker_pb2
from baton.requests import (
    AttemptRef,
    Delivered,
    FinishReason,
    Grammar,
    GrammarKind,
    Logprobs,
    RequestSpec,
    SamplingParams,
    Token,
)
from baton.v1 import inference_pb2

# Positions of a prompt in one message: with 20 top tokens at each a quarter of a megabyte.
_MAX_POSITIONS = 1024


def ref_to_wire(ref: AttemptRef) -> transfer_pb2.AttemptRef:
    return transfer_pb2.AttemptRef(request_id=ref.request_id, attempt=ref.attempt)


def ref_from_wire(message: transfer_pb2.AttemptRef) -> AttemptRef:
    return AttemptRef(message.request_id, message.attempt)


def sampling_to_wire(params: SamplingParams) -> worker_pb2.ResolvedSampling:
    return worker_pb2.ResolvedSampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        n=params.n,
        eos_token_ids=params.eos_token_ids,
        stop_token_ids=params.stop_token_ids,
        min_tokens=params.min_tokens,
        logit_bias=params.logit_bias,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        grammar=None if params.grammar is None else grammar_to_wire(params.grammar),
    )


def sampling_from_wire(message: worker_pb2.ResolvedSampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        seed=message.seed,
        n=message.n,
        eos_token_ids=tuple(message.eos_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        logit_bias=dict(message.logit_bias),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=grammar_from_wire(message.grammar) if message.HasField("grammar") else None,
    )


def grammar_to_wire(grammar: Grammar) -> inference_pb2.Grammar:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return inference_pb2.Grammar(json_schema=grammar.texts[0])
        case GrammarKind.JSON_OBJECT:
            return inference_pb2.Grammar(json_object=True)
        case GrammarKind.REGEX:
            return inference_pb2.Grammar(regex=grammar.texts[0])
        case GrammarKind.CHOICE:
            return inference_pb2.Grammar(choice=inference_pb2.Alternatives(texts=grammar.texts))
        case GrammarKind.LARK:
            return inference_pb2.Grammar(lark=grammar.texts[0])


def grammar_from_wire(message: inference_pb2.Grammar) -> Grammar | None:
    """None where no kind is set, or `json_object` is set to false."""
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "json_object":
        return Grammar(GrammarKind.JSON_OBJECT) if message.json_object else None
    texts = tuple(message.choice.texts) if kind == "choice" else (getattr(message, kind),)
    return Grammar(GrammarKind(kind), texts)


def spec_to_wire(spec: RequestSpec) -> worker_pb2.RequestSpec:
    return worker_pb2.RequestSpec(
        ref=ref_to_wire(spec.ref),
        router_id=spec.router_id,
        prompt_token_ids=spec.prompt_token_ids,
        sampling=sampling_to_wire(spec.sampling),
        delivered=[
            worker_pb2.DeliveredChoice(token_ids=choice.token_ids, finished=choice.finished)
            for choice in spec.delivered
        ],
        block_hashes=spec.block_hashes,
        salt_root=spec.salt_root,
        priority=spec.priority,
        timeout_s=spec.timeout_s,
        max_unacked_tokens=spec.max_unacked_tokens,
    )


def spec_from_wire(message: worker_pb2.RequestSpec) -> RequestSpec:
    return RequestSpec(
        ref=ref_from_wire(message.ref),
        router_id=message.router_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_wire(message.sampling),
        delivered=tuple(Delivered(tuple(choice.token_ids), choice.finished) for choice in message.delivered),
        block_hashes=tuple(message.block_hashes),
        salt_root=message.salt_root,
        priority=message.priority,
        timeout_s=message.timeout_s if message.HasField("timeout_s") else None,
        max_unacked_tokens=message.max_unacked_tokens,
    )


def token_to_wire(token: Token) -> worker_pb2.TokenOut:
    template = worker_pb2.TokenOut(ref=ref_to_wire(token.ref), choice=token.choice)
    return token_of_choice(template, token.position, token.token_id, token.logprobs, token.finish_reason)


def token_of_choice(
    template: worker_pb2.TokenOut,
    position: int,
    token_id: int,
    logprobs: Logprobs | None,
    finish_reason: FinishReason,
) -> worker_pb2.TokenOut:
    """A token of the choice that `template` names; copying one takes a third of the time that making one takes."""
    message = worker_pb2.TokenOut()
    message.CopyFrom(template)
    message.position = position
    message.token_id = token_id
    if finish_reason is not FinishReason.NONE:
        message.finish_reason = inference_pb2.FinishReason.ValueType(int(finish_reason))
    if logprobs is not None:
        message.logprobs.CopyFrom(logprobs_to_wire(token_id, logprobs))
    return message


def token_from_wire(message: worker_pb2.TokenOut) -> Token:
    logprobs = None
    if message.HasField("logprobs"):
        logprobs = Logprobs(
            sampled=message.logprobs.sampled.logprob,
            top=tuple((entry.token_id, entry.logprob) for entry in message.logprobs.top),
        )
    return Token(
        ref=ref_from_wire(message.ref),
        choice=message.choice,
        position=message.position,
        token_id=message.token_id,
        logprobs=logprobs,
        finish_reason=FinishReason(message.finish_reason),
    )


def prompt_logprobs_to_wire(
    ref: AttemptRef, prompt_token_ids: Sequence[int], start: int, logprobs: Sequence[Logprobs]
) -> list[worker_pb2.PromptLogprobs]:
    """The logprobs of the prompt's tokens from position `start` on, in messages of bounded size."""
    return [
        worker_pb2.PromptLogprobs(
            ref=ref_to_wire(ref),
            start=start + first,
            positions=[
                logprobs_to_wire(token_id, entry)
                for token_id, entry in zip(
                    prompt_token_ids[start + first : start + len(logprobs)],
                    logprobs[first : first + _MAX_POSITIONS],
                    strict=False,
                )
            ],
        )
        for first in range(0, len(logprobs), _MAX_POSITIONS)
    ]


def logprobs_to_wire(token_id: int, logprobs: Logprobs) -> inference_pb2.PositionLogprobs:
    return inference_pb2.PositionLogprobs(
        sampled=inference_pb2.TokenLogprob(token_id=token_id, logprob=logprobs.sampled),
        top=[inference_pb2.TokenLogprob(token_id=top_id, logprob=value) for top_id, value in logprobs.top],
    )
