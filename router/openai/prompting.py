"""From what a client sends to the tokens that the model reads."""

from __future__ import annotations

from baton.v1 import inference_pb2
from router.openai.chat_format import ChatFormat, Turn
from router.openai.chat_request import ChatRequest, ConversationFields
from router.openai.completion_request import CompletionRequest, Prompt
from router.openai.output_format import JsonObject
from router.tokenization import Tokenizer


class Prompting:
    """Renders and tokenises, off the event loop."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self._tokenizer = tokenizer
        self._chat_format = chat_format

    async def completion(self, request: CompletionRequest, prompt: Prompt) -> inference_pb2.GenerateRequest:
        """The pipeline's request for one prompt, without its sampling."""
        plain = request.truncate_prompt_tokens is None
        if isinstance(prompt, str) and plain and request.add_special_tokens:
            return _generate_request(request, text=prompt)
        if isinstance(prompt, str) and prompt:
            prompt = await self._tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)
        return _generate_request(request, ids=list(prompt) if prompt else [])

    async def chat(self, request: ChatRequest) -> tuple[inference_pb2.GenerateRequest, Turn]:
        """The pipeline's request for a conversation, without its sampling, and what the model is about to write.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the conversation.
        """
        prompt, token_ids = await self.conversation(request, request.offered_tools)
        return _generate_request(request, ids=token_ids), self._chat_format.turn(request, prompt)

    async def conversation(self, request: ConversationFields, offered_tools: list[JsonObject]) -> tuple[str, list[int]]:
        """A conversation as text and as tokens."""
        prompt = await self._tokenizer.run(self._chat_format.render, request, offered_tools)
        return prompt, await self._tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens)


def _generate_request(
    request: CompletionRequest | ChatRequest, *, text: str | None = None, ids: list[int] | None = None
) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(priority=request.priority, cache_salt=request.cache_salt or "")
    if text is not None:
        made.text = text
    else:
        made.token_ids.ids.extend((ids or [])[-(request.truncate_prompt_tokens or 0) :])
        # An empty list would leave the prompt unset.
        made.token_ids.SetInParent()
    return made
