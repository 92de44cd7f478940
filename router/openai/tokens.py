"""`/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from baton.errors import InvalidRequestError
from router.openai.body import as_model, read_model, read_object
from router.openai.call import Call
from router.openai.chat_request import ConversationFields
from router.openai.errors import refused
from router.openai.fields import ApiModel, UInt32
from router.openai.prompting import Prompting
from router.openai.served_model import ServedModel
from router.openai.token_bytes import TokenBytes
from router.tokenization import Tokenizer

# More than any model reads.
_MAX_TOKENS = 1 << 20


class TokenizeText(ApiModel):
    """A text."""

    model: str = ""
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeConversation(ConversationFields):
    """A conversation, through the chat template."""

    model: str = ""
    return_token_strs: bool = False


class DetokenizeRequest(ApiModel):
    """Token ids."""

    model: str = ""
    tokens: Annotated[list[UInt32], Field(fail_fast=True, max_length=_MAX_TOKENS)]


class TokenRoutes:
    """Answers both routes."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        prompting: Prompting,
        model: ServedModel,
        token_bytes: TokenBytes,
        max_body_bytes: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompting = prompting
        self._model = model
        self._token_bytes = token_bytes
        self._max_body_bytes = max_body_bytes

    async def tokenize(self, request: Request, call: Call) -> Response:
        """`POST /tokenize`: of a prompt or of messages."""
        body = await read_object(request, self._max_body_bytes)
        if body.get("messages") is not None and body.get("prompt") is not None:
            raise refused("prompt", "cannot go with messages")
        asked: TokenizeText | TokenizeConversation
        if body.get("messages") is not None:
            asked = as_model(body, TokenizeConversation)
            self._model.check(asked.model)
            _, token_ids = await self._prompting.conversation(asked, asked.tools)
        else:
            asked = as_model(body, TokenizeText)
            self._model.check(asked.model)
            token_ids = await self._tokenizer.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self._model.max_model_len,
            "tokens": token_ids,
            "token_strs": list(map(self._token_bytes.text, token_ids)) if asked.return_token_strs else None,
        }
        return Response(await self._tokenizer.run(_as_json, answer), media_type="application/json")

    async def detokenize(self, request: Request, call: Call) -> Response:
        """`POST /detokenize`; special tokens show in the text."""
        asked = await read_model(request, DetokenizeRequest, self._max_body_bytes)
        self._model.check(asked.model)
        if asked.tokens and max(asked.tokens) >= self._model.vocab_size:
            problem = f"{max(asked.tokens)} is not below the vocabulary's {self._model.vocab_size}"
            raise InvalidRequestError("tokens", problem)
        text = await self._tokenizer.run(self._tokenizer.decode, asked.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})


def _as_json(answer: dict[str, Any]) -> bytes:
    return to_json(answer)
