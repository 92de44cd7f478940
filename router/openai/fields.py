"""The fields that completions and chats share, with their types and ranges, and what they mean to the pipeline.

OpenAI's fields and the extra ones that vLLM's users know. `null` is as good as leaving a field out. Unknown fields are
ignored, as both do; known ones that would change the answer and are not served are refused. Ranges that depend on the
model or on the router's configuration are checked by `router.validation`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from baton.v1 import inference_pb2
from router.openai.errors import refused, shown
from router.openai.output_format import MANY, JsonObject, OutputFields, ResponseFormat, StructuredOutputs

_log = logging.getLogger(__name__)

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_MAX_STOPS = 65536
_MAX_BIASES = 65536
_MAX_FLOAT32 = 3.4e38

_NOT_SERVED: Mapping[str, str] = {
    "allowed_token_ids": "is not served; use structured_outputs or logit_bias",
    "audio": "is not served: this is a text model",
    "bad_words": "is not served; use logit_bias",
    "chat_template": "cannot be chosen by a request; the checkpoint's own is used",
    "function_call": "is not served; use tool_choice",
    "functions": "is not served; use tools",
    "logits_processors": "is not served",
    "mm_processor_kwargs": "is not served: this is a text model",
    "prompt_embeds": "is not served",
    "structural_tag": "is not served; use structured_outputs",
    "suffix": "is not served: the model does not fill in the middle",
    "use_beam_search": "is not served",
    "web_search_options": "is not served",
}


class ApiModel(pydantic.BaseModel):
    """Base of all requests: no type is guessed from another, numbers are finite."""

    model_config = pydantic.ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )
    not_served: ClassVar[Mapping[str, str]] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _sift(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name, problem in cls.not_served.items():
            # Clients write out defaults that mean nothing: false, "", [].
            if given.get(name):
                raise refused(name, problem, "unsupported_parameter")
        if _log.isEnabledFor(logging.DEBUG):
            unknown = given.keys() - cls.model_fields.keys() - cls.not_served.keys()
            _log.debug("fields that mean nothing here are ignored: %s", [name[:50] for name in sorted(unknown)[:20]])
        return given


class StreamOptions(ApiModel):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(ApiModel):
    """What completions and chats share."""

    not_served: ClassVar[Mapping[str, str]] = _NOT_SERVED

    model: str = ""
    max_tokens: UInt32 | None = None
    n: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    best_of: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    # -1 means all, as vLLM has it.
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    stop: str | list[str] = []
    stop_token_ids: Annotated[list[UInt32], MANY] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: UInt32 = 0
    logit_bias: dict[str, float] = {}
    skip_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    prompt_logprobs: UInt32 | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int32 = 0
    cache_salt: Annotated[str, Field(min_length=1)] | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | JsonObject | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], MANY] | None = None
    guided_grammar: str | None = None

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        if isinstance(stop, list) and len(stop) > _MAX_STOPS:
            raise refused("stop", f"has {len(stop)} strings; at most {_MAX_STOPS} are allowed")
        if isinstance(stop, str) or (isinstance(stop, list) and all(isinstance(each, str) for each in stop)):
            return stop
        raise refused("stop", "must be a string or a list of strings", "invalid_type")

    @pydantic.field_validator("logit_bias", mode="before")
    @classmethod
    def _check_logit_bias(cls, given: Any) -> Any:
        """What is not a number is found here: pydantic would describe each of millions."""
        if not isinstance(given, dict):
            return given
        if len(given) > _MAX_BIASES:
            raise refused("logit_bias", f"has {len(given)} tokens; at most {_MAX_BIASES} are allowed")
        for key, bias in given.items():
            if type(bias) not in (int, float):
                raise refused(f"logit_bias.{key[:20]}", f"must be a number, got {shown(bias)}", "invalid_type")
        return given

    @pydantic.field_validator("guided_json", mode="before")
    @classmethod
    def _check_guided_json(cls, schema: Any) -> Any:
        if isinstance(schema, str | dict):
            return schema
        raise refused("guided_json", "must be a JSON schema, as an object or as a string", "invalid_type")

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> GenerationFields:
        if self.best_of not in (None, self.n):
            problem = f"is not served: every one of the n choices is returned; leave it out or set it to n, {self.n}"
            raise refused("best_of", problem, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "can only go with stream")
        if self.prompt_logprobs is not None and self.stream:
            raise refused("prompt_logprobs", "cannot go with stream")
        return self

    @property
    def output(self) -> OutputFields:
        """All fields that say what the answer must look like."""
        return OutputFields(
            response_format=self.response_format,
            structured_outputs=self.structured_outputs,
            guided_json=self.guided_json,
            guided_regex=self.guided_regex,
            guided_choice=self.guided_choice,
            guided_grammar=self.guided_grammar,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with an event that tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each event of a stream tells the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    def sampling(self) -> inference_pb2.SamplingParams:
        """The part of the pipeline's parameters that both APIs name alike."""
        sampling = inference_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=None if self.temperature is None else _float32("temperature", self.temperature),
            top_p=None if self.top_p is None else _float32("top_p", self.top_p),
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=None if self.min_p is None else _float32("min_p", self.min_p),
            presence_penalty=_float32("presence_penalty", self.presence_penalty),
            frequency_penalty=_float32("frequency_penalty", self.frequency_penalty),
            repetition_penalty=None
            if self.repetition_penalty is None
            else _float32("repetition_penalty", self.repetition_penalty),
            # Negative seeds are as good as others.
            seed=None if self.seed is None else self.seed % 2**64,
            n=self.n,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logit_bias=_logit_bias(self.logit_bias),
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )
        if (constraint := self.output.grammar()) is not None:
            sampling.grammar.CopyFrom(constraint[1])
        return sampling

    def field_names(self) -> dict[str, str]:
        """What this API calls the fields that the pipeline may find at fault, where the names differ."""
        constraint = self.output.grammar()
        field = constraint[0] if constraint is not None else "tool_choice"
        kinds = ("json_schema", "json_object", "regex", "choice", "lark")
        return {"grammar": field, **{f"grammar.{kind}": field for kind in kinds}}


def _float32(field: str, value: float) -> float:
    """The value, which protobuf must not turn into infinity."""
    if abs(value) > _MAX_FLOAT32:
        raise refused(field, f"is out of range, got {value:g}")
    return value


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        # Only ASCII digits: int() would read more.
        if not (key.isascii() and key.isdigit()) or len(key) > 10 or int(key) >= 2**32:
            raise refused("logit_bias", f"keys must be token ids, got {key[:20]!r}")
        biases[int(key)] = _float32("logit_bias", bias)
    return biases
