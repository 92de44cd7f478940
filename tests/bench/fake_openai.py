"""A small server with OpenAI's API, run by itself: `python fake_openai.py PORT [--alone FILE] [--refuse TOKENS]`.

A token each millisecond, and a millisecond of prefill for each hundred tokens of a prompt, whoever else is served.
With --alone it ends at once where another that was given the same file runs; with --refuse, prompts of so many tokens
get status 500.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib

from aiohttp import web


async def health(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": "7.7"})


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})


async def completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if len(body["prompt"]) == request.app[REFUSED]:
        return web.json_response({"error": {"message": "no such length"}}, status=500)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await asyncio.sleep(len(body["prompt"]) / 100e3)
    for _ in range(body["max_tokens"]):
        await asyncio.sleep(0.001)
        await _send(response, {"choices": [{"index": 0, "text": "a", "finish_reason": None}]})
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    await _send(response, {"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _send(response: web.StreamResponse, event: object) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


REFUSED = web.AppKey("REFUSED", int)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--alone", type=pathlib.Path)
    parser.add_argument("--refuse", type=int, default=-1)
    arguments = parser.parse_args()
    app = web.Application()
    app[REFUSED] = arguments.refuse
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/version", version),
            web.get("/v1/models", models),
            web.post("/v1/completions", completions),
        ]
    )
    if arguments.alone is not None:
        arguments.alone.touch(exist_ok=False)
    try:
        web.run_app(app, host="127.0.0.1", port=arguments.port, print=None)
    finally:
        if arguments.alone is not None:
            arguments.alone.unlink()


if __name__ == "__main__":
    main()
