"""The checkpoint's chat template: from the messages of a conversation to the text of a prompt.

Renders as transformers' `apply_chat_template` does (utils/chat_template_utils.py), without loading transformers. What
OpenAI's clients write otherwise than templates read is put right first (`router.openai.template_input`).

Loading reads files. Rendering is pure, may be called from any thread, and takes milliseconds for a long conversation:
call it in the tokenizer's threads.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from baton.errors import InvalidRequestError
from router.model_card import ModelCard
from router.openai.template_input import prepare_messages, reads_content_parts

# Of a rendered prompt. The longest contexts served are some ten million tokens.
_MAX_CHARS = 64 << 20
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Where a message's reasoning may stand; templates read one of them.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

Message = dict[str, Any]


class ChatTemplate:
    """One model's templates, compiled once.

    Args:
        sources: template text by name; "default" for every request, "tool_use" instead of it for one that has tools.
        special_tokens: what templates know as `bos_token` and so on.
        model: the served name, for errors.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], *, model: str) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._model = model
        environment = _environment()
        self._compiled: dict[str, jinja2.Template] = {}
        for name, source in self._sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"chat template {name!r} of {model}: line {error.lineno}: {error.message}") from error
        self._wants_parts = {name: reads_content_parts(environment, text) for name, text in self._sources.items()}

    @classmethod
    def load(cls, checkpoint_dir: str, card: ModelCard) -> ChatTemplate:
        """The templates of a checkpoint folder, maybe none; ValueError where one is not valid.

        `chat_template.jinja` and `additional_chat_templates/*.jinja` win over the entries of tokenizer_config.json.
        """
        folder = pathlib.Path(checkpoint_dir)
        config = _read_json(folder / "tokenizer_config.json")
        return cls(_read_sources(folder, config), _read_special_tokens(folder, config), model=card.name)

    def source(self, *, tools: bool = False) -> str | None:
        """The text of the template that such a request uses; None where the checkpoint has none."""
        return self._sources.get("tool_use" if tools and "tool_use" in self._sources else "default")

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens as text: encode it without adding any.

        Args:
            messages: as OpenAI's clients send them, not empty.
            tools: OpenAI's `tools`.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it.
            documents: for templates that can quote them.
            template_kwargs: variables of the template's own, such as `enable_thinking`.

        Raises:
            InvalidRequestError: the model has no template, or the template refuses this conversation.
        """
        name = self._choose(tools is not None)
        if not messages:
            raise InvalidRequestError("messages", "at least one message is needed")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message", "cannot go with add_generation_prompt: the last message is open or it is not"
            )
        extra = dict(template_kwargs or {})
        for reserved in _RESERVED:
            if reserved in extra:
                raise InvalidRequestError("chat_template_kwargs", f"{reserved} is a field of the request itself")
        chat = _alias_reasoning(prepare_messages(messages, source=self._sources[name], parts=self._wants_parts[name]))
        continued = self._open_last(chat, self._sources[name]) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **extra,
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        prompt = _run(self._compiled[name], variables)
        return prompt if continued is None else _cut(prompt, continued)

    def _choose(self, has_tools: bool) -> str:
        if has_tools and "tool_use" in self._compiled:
            return "tool_use"
        if "default" in self._compiled:
            return "default"
        if self._compiled:
            names = ", ".join(sorted(self._compiled))
            raise InvalidRequestError("messages", f"the chat templates of {self._model} ({names}) lack a default one")
        raise InvalidRequestError(
            "messages", f"{self._model} has no chat template: send a prompt to /v1/completions instead"
        )

    @staticmethod
    def _open_last(chat: list[Message], source: str) -> str:
        """Marks the end of the last message's content, where the prompt will be cut; returns that content."""
        content = chat[-1].get("content")
        if content is None:
            raise InvalidRequestError("continue_final_message", "the last message has no content to go on with")
        if "content" not in source:
            raise InvalidRequestError("continue_final_message", "the chat template reads no content")
        if isinstance(content, str):
            chat[-1]["content"] = content + _CONTINUE_TAG
            return content
        for part in reversed(content):
            if "text" in part:
                text: str = part["text"]
                part["text"] = text + _CONTINUE_TAG
                return text
        raise InvalidRequestError("continue_final_message", "the last message has no text to go on with")


def _run(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in template.generate(variables):
            num_chars += len(piece)
            if num_chars > _MAX_CHARS:
                raise InvalidRequestError("messages", f"the chat template makes more than {_MAX_CHARS} characters")
            pieces.append(piece)
    except InvalidRequestError:
        raise
    except RecursionError:
        raise InvalidRequestError("messages", "nested too deeply for the chat template") from None
    except jinja2.TemplateError as error:
        # What the template's own raise_exception says is meant for whoever wrote the messages.
        raise InvalidRequestError("messages", f"the chat template refuses them: {error.message}") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise InvalidRequestError("messages", f"the chat template cannot render them: {error}") from error
    return "".join(pieces)


def _cut(prompt: str, content: str) -> str:
    """The prompt up to the mark that `_open_last` left, without it."""
    mark = _CONTINUE_TAG.strip()
    if content.strip() not in prompt or mark not in prompt:
        raise InvalidRequestError("continue_final_message", "the chat template drops or changes the last message")
    end = prompt.rindex(mark)
    if prompt[end : end + len(_CONTINUE_TAG)] == _CONTINUE_TAG:
        return prompt[:end]
    # The template trims its messages, so it would have trimmed this one without the mark.
    return prompt[:end].rstrip()


def _alias_reasoning(chat: list[Message]) -> list[Message]:
    aliased = []
    for message in chat:
        reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        aliased.append(message)
    return aliased


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks assistant text for training and here renders as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja reads it from the class

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body)
        block.set_lineno(line)
        return block

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        text: str = caller()
        return text


class _TemplateDict:
    """`dict` for templates: makes dicts, and gives no way to Python's type objects."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, which refuses attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Jinja's own signature: `namespace(self=...)` is allowed.
        self = args[0]
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    offered: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    environment.globals.update(offered)
    return environment


def _read_sources(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    sources = {}
    if (file := folder / "chat_template.jinja").is_file():
        sources["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[file.stem] = file.read_text(encoding="utf-8")
    if sources:
        return sources
    configured = config.get("chat_template")
    if isinstance(configured, str):
        return {"default": configured}
    try:
        return {entry["name"]: entry["template"] for entry in configured or ()}
    except (TypeError, KeyError):
        path = folder / "tokenizer_config.json"
        raise ValueError(f"{path}: chat_template is neither a text nor a list of named ones") from None


def _read_special_tokens(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    entries = dict(config)
    # A tokenizer_config.json with added_tokens_decoder is complete; older ones leave part to the other file.
    if "added_tokens_decoder" not in config:
        entries |= _read_json(folder / "special_tokens_map.json")
    for extra in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(named := entries.pop(extra, None), dict):
            entries |= named
    names = [*_TOKEN_NAMES, *(name for name in entries if name.endswith("_token") and name not in _TOKEN_NAMES)]
    texts = {name: _token_text(entries.get(name)) for name in names}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(entry: Any) -> str | None:
    """Of a token that is named by its text or by the fields of an AddedToken."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds no JSON object")
    return loaded
