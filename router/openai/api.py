"""The OpenAI-compatible API as a whole: its parts, made and joined, and its routes.

/v1/completions, /v1/chat/completions   generate
/v1/models, /v1/models/{model}          what is served
/v1/embeddings                          501
/tokenize, /detokenize                  as vLLM has them
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from baton.config import RouterConfig
from router.api_keys import ApiKeys
from router.openai.call import Call, new_id
from router.openai.chat_format import ChatFormat
from router.openai.envelope import Json
from router.openai.errors import ApiError, as_api_error
from router.openai.event_stream import NoAnswer
from router.openai.generation import Generates
from router.openai.prompting import Prompting
from router.openai.served_model import ServedModel
from router.openai.serving import Serving
from router.openai.token_bytes import TokenBytes
from router.openai.tokens import TokenRoutes
from router.tokenization import Tokenizer

_Handler = Callable[[Request, Call], Awaitable[Response]]


class OpenAIApi:
    """What the router's server needs of this API.

    Attributes:
        routes: to be added to the HTTP side.
    """

    def __init__(
        self,
        *,
        pipeline: Generates,
        tokenizer: Tokenizer,
        model: ServedModel,
        chat_format: ChatFormat,
        keys: ApiKeys,
        config: RouterConfig,
    ) -> None:
        self._model = model
        self._keys = keys
        token_bytes = TokenBytes(tokenizer.fast)
        prompting = Prompting(tokenizer, chat_format)
        serving = Serving(pipeline=pipeline, prompting=prompting, model=model, token_bytes=token_bytes, config=config)
        tokens = TokenRoutes(
            tokenizer=tokenizer,
            prompting=prompting,
            model=model,
            token_bytes=token_bytes,
            max_body_bytes=config.max_message_bytes,
        )
        self.routes: Sequence[BaseRoute] = [
            self._route("POST", "/v1/completions", serving.completions),
            self._route("POST", "/v1/chat/completions", serving.chat_completions),
            self._route("GET", "/v1/models", self._models),
            # Names of models have slashes.
            self._route("GET", "/v1/models/{model:path}", self._one_model),
            self._route("POST", "/v1/embeddings", _embeddings),
            self._route("POST", "/tokenize", tokens.tokenize),
            self._route("POST", "/detokenize", tokens.detokenize),
        ]

    def _route(self, method: str, path: str, handler: _Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            request_id = new_id()
            try:
                self._keys.check(request.headers.get("authorization"))
                call = Call.of(request)
                request_id = call.request_id
                response = await handler(request, call)
            except ClientDisconnect:
                return NoAnswer()
            except Exception as error:
                response = as_api_error(error).response()
            response.headers["x-request-id"] = request_id
            return response

        return Route(path, endpoint, methods=[method])

    async def _models(self, request: Request, call: Call) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_json()]})

    async def _one_model(self, request: Request, call: Call) -> Response:
        self._model.check(request.path_params["model"] or "/")
        return JSONResponse(self._model_json())

    def _model_json(self) -> Json:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "baton",
            "root": self._model.name,
            "parent": None,
            "max_model_len": self._model.max_model_len,
        }


async def _embeddings(request: Request, call: Call) -> Response:
    raise ApiError(HTTPStatus.NOT_IMPLEMENTED, "embeddings are not served: this is a model that generates text")
