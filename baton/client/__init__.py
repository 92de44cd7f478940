"""The Python client of Baton's gRPC API: `Client` for threads, `AsyncClient` for asyncio.

Answers are frozen dataclasses; everything that goes wrong at run time is raised as one of `baton.errors`.
"""

from baton.client.aio import AsyncClient
from baton.client.channel import Tls
from baton.client.request import GenerateOptions
from baton.client.results import (
    Choice,
    ChoiceDelta,
    ClusterStatus,
    Completion,
    Delta,
    ModelInfo,
    PromptEcho,
    Usage,
    WorkerStatus,
)
from baton.client.sync import Client
from baton.requests import FinishReason, Logprobs
from baton.stages import StageTimings

__all__ = [
    "AsyncClient",
    "Choice",
    "ChoiceDelta",
    "Client",
    "ClusterStatus",
    "Completion",
    "Delta",
    "FinishReason",
    "GenerateOptions",
    "Logprobs",
    "ModelInfo",
    "PromptEcho",
    "StageTimings",
    "Tls",
    "Usage",
    "WorkerStatus",
]
